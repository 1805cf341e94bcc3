"""An adapter trained for another program: `python -m stellarbyte.train.job`, settings and progress as JSON lines."""
