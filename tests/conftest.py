"""What all tests share."""

import torch

# The networks here are so small that a second thread waits more than it works, above all on a
# machine that does something else besides.
torch.set_num_threads(1)
