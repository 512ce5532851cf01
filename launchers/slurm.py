"""Queue a verb as a SLURM job, as `moce launch slurm`.

python launchers/slurm.py PROFILE.yaml pretrain CONFIG.yaml
"""

import sys

from moce_ds.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["launch", "slurm"]
    main()
