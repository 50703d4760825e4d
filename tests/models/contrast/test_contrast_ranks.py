"""Two ranks that share a batch get the loss, the gradient and the memory of one process with the whole batch."""

import torch

from models.contrast.memories import FifoQueue
from models.contrast.paco import GPaCo
from models.distributed import rank, rank_count
from tests.support.contrast_cases import LOG_PRIOR, inputs, unchanged, unit
from tests.support.small_training import in_ranks


def step():
    """Run a step on this rank's share of six images; return loss, gradient, and the stored rows."""
    size = 6 // rank_count()
    own = slice(rank() * size, (rank() + 1) * size)
    term = GPaCo(unchanged(), LOG_PRIOR, FifoQueue(6, 4, torch.Generator().manual_seed(0)).double(), 0.5)
    views = unit(2, 6, 4)[:, own].requires_grad_()
    logits = unit(2, 6, 3, seed=1)[:, own]
    loss = term(inputs(views, torch.tensor([0, 1, 0, 2, 1, 0])[own], torch.arange(6)[own], logits=logits))["loss"]
    loss.backward()
    term.after_step()
    return loss.detach(), views.grad / rank_count(), term.queue.features


def test_two_ranks_equal_one_process(tmp_path):
    loss, gradient, rows = step()
    (loss_0, gradient_0, rows_0), (loss_1, gradient_1, rows_1) = in_ranks(step, tmp_path)
    torch.testing.assert_close((loss_0 + loss_1) / 2, loss)
    torch.testing.assert_close(torch.cat([gradient_0, gradient_1], 1), gradient)
    torch.testing.assert_close(rows_0, rows)
    torch.testing.assert_close(rows_1, rows)
