"""What the deepspeed launcher starts on every rank where there is no checkout, whose launch/train.py does the same:

deepspeed --module dist_train.train --config finetune/dinov2_small.yaml [--section.key value ...] [--resume auto]
"""

import sys

from dist_train.launcher import note_launcher

if __name__ == "__main__":
    note_launcher()  # before the imports, which take seconds

    from dist_train.cli import run_training
    from dist_train.errors import run_command
    from dist_train.output import keep_stdout

    sys.exit(run_command(lambda: run_training(sys.argv[1:], keep_stdout)))
