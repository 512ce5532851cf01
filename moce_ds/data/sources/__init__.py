"""Where images come from: folders, data sets on disk, public sets, COCO, ADE20K."""
