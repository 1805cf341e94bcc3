"""The training process of a job at usual priority: tests share the cores, and it would get nothing of them."""

import sys

from stellarbyte.train.job import __main__ as job

if __name__ == "__main__":
    job.NICENESS = 0
    sys.exit(job.main())
