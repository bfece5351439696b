"""What one kernel tells the host of a layer's routing, against counting in plain torch."""

import pytest
import torch

from moe_engine.kernels.layer_choice import ChoiceOnHost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_EXPERT, TOP_K, HIDDEN = 10, 3, 700


@pytest.mark.parametrize(("n_token", "n_foreseen"), [(1, 0), (7, 7), (4, 900)])
def test_host_learns_the_choice(n_token: int, n_foreseen: int) -> None:
    generator = torch.Generator().manual_seed(n_token)
    ids = torch.randint(0, N_EXPERT, (n_token, TOP_K), generator=generator)
    foreseen = torch.randint(0, N_EXPERT, (n_foreseen, TOP_K), generator=generator, dtype=torch.int32)
    tables = torch.randint(-1, 50, (2, N_EXPERT), generator=generator, dtype=torch.int32)
    x, weights = torch.randn(n_token, HIDDEN, generator=generator), torch.rand(n_token, TOP_K, generator=generator)
    counts = torch.bincount(ids.flatten(), minlength=N_EXPERT)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    host = ChoiceOnHost(N_EXPERT, 8, HIDDEN, TOP_K, DEVICE)
    at, slots, next_ids, *inputs = (part.to(DEVICE) for part in (offsets, tables, foreseen, x, ids, weights))
    if DEVICE.type == "cpu":  # in Triton's interpreter; `read` counts in plain torch
        host._launch(at, slots, next_ids, (inputs[0], inputs[1], inputs[2]))
        found = host._numbers.tolist()
    else:
        found = [row.tolist() for row in host.read(at, slots, next_ids, (inputs[0], inputs[1], inputs[2]))]
    of_next = torch.bincount(foreseen.flatten(), minlength=N_EXPERT)
    assert found == [counts.tolist(), *tables.tolist(), of_next.tolist()]
    assert torch.equal(host.x[:n_token], x)
    assert torch.equal(host.ids[:n_token], ids.int())
    assert torch.equal(host.weights[:n_token], weights)
    last = host.read(at, slots[:1], None, None)  # of the last layer, and without inputs
    assert (last.resident.tolist(), last.foreseen.tolist()) == (tables[0].tolist(), [0] * N_EXPERT)
