"""Trains a small MinGRU to follow the mean of what it has seen, and writes its bundle: `python -m my_cell.write DIRECTORY`."""

import sys
from pathlib import Path

import torch

from engram_models import write_bundle
from my_cell import MinGRU


def main(directory: Path) -> None:
    torch.manual_seed(1)
    cell = MinGRU(input_size=3, hidden_size=8, output_size=2)
    optimizer = torch.optim.Adam(cell.parameters(), 0.02)
    for _ in range(50):
        xs = torch.randn(16, 20, 3)
        wanted = (xs.cumsum(1) / torch.arange(1, 21)[:, None])[..., :2]
        loss = (cell.sequence(xs)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = write_bundle(directory, "follower", "1", cell.eval(), "follows the mean of its inputs")
    print(f"loss {loss.item():.3f}; wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
