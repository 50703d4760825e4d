"""Two ranks that share a batch: the pixel loss is that of the whole batch, and both ranks hold the same queues."""

import torch

from models.distributed import rank, rank_count
from models.segmentation.contrast import CellContrast
from models.segmentation.losses import pixel_cross_entropy
from tests.support.small_training import in_ranks

LOG_PRIOR = torch.tensor([0.7, 0.2, 0.1]).log()


def step():
    """Run a step on this rank's share of four images; return loss and gradient of the pixels, and the queues."""
    torch.manual_seed(0)
    size = 4 // rank_count()
    own = slice(rank() * size, (rank() + 1) * size)
    logits, labels = torch.randn(4, 3, 4, 4)[own].requires_grad_(), torch.randint(3, (4, 16, 16))
    labels[0] = 255  # the ranks have different numbers of pixels with a class
    loss = pixel_cross_entropy(logits, labels[own], LOG_PRIOR, 0.2)
    loss.backward()
    contrast = CellContrast(8, 8, [7, 2, 1], queue_total=30, queue_minimum=5, queries=8, keys=12, projection_dim=4)
    features = torch.randn(4, 8, 4, 4)[own]
    contrast(features, features, labels[own], torch.arange(4)[own], LOG_PRIOR)
    return loss.detach(), logits.grad / rank_count(), contrast.queues.features, contrast.queues.sample_ids


def test_two_ranks_average_over_the_pixels_of_both_and_store_the_cells_of_both(tmp_path):
    loss, gradient, *_ = step()
    (loss_0, gradient_0, rows_0, ids_0), (loss_1, gradient_1, rows_1, ids_1) = in_ranks(step, tmp_path)
    torch.testing.assert_close((loss_0 + loss_1) / 2, loss)
    torch.testing.assert_close(torch.cat([gradient_0, gradient_1]), gradient)
    assert torch.equal(rows_0, rows_1) and torch.equal(ids_0, ids_1)
    assert {1, 2, 3} <= set(ids_0.tolist())
