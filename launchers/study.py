"""Run and evaluate a grid of pre-training runs, as `moce study`.

python launchers/study.py STUDY.yaml
"""

import sys

from moce_ds.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["study"]
    main()
