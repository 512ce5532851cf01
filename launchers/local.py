"""Start a verb in several processes on this machine, as `moce launch local`.

python launchers/local.py --nproc 2 pretrain CONFIG.yaml
"""

import sys

from moce_ds.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["launch", "local"]
    main()
