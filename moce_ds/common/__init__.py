"""What every part uses: errors, safe text, settings, files on disk, and this machine."""
