"""Data-parallel training on the CPU, watched: a rank that hangs is ended, and the job goes on.

Four processes train one small model on scikit-learn's handwritten digits and average their
gradients after every step. Let one of them hang, in C with the GIL held:

    hangwatch run -- torchrun --nproc-per-node 4 --max-restarts 1 \
        examples/ddp_digits.py --hang-rank 2 --hang-at-step 20

hangwatch kills that rank and says where it was; torchrun starts all of them again; they go
on from the last checkpoint. Nothing here says who watches: `hangwatch run` put that into the
environment. Needs torch and scikit-learn. With ``HANGWATCH_ADDRESS=off``, it runs unwatched.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn import functional

import hangwatch

HELD_OUT = 360
BATCH = 32
CHECKPOINT_EVERY = 5


def stop_in_c() -> None:
    """Read from a pipe that nobody writes, in C, with the GIL held."""
    read_end, _write_end = os.pipe()
    ctypes.PyDLL(None).read(read_end, ctypes.create_string_buffer(1), 1)


def forward_backward(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item()


def average_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def save(checkpoint: Path, state: dict[str, object]) -> None:
    # Whoever is killed while writing leaves the old checkpoint whole.
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    draft = checkpoint.with_name(f"{checkpoint.name}.new")
    torch.save(state, draft)
    draft.replace(checkpoint)


def train(arguments: argparse.Namespace) -> None:
    rank, world, attempt = dist.get_rank(), dist.get_world_size(), arguments.attempt
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    mine = torch.arange(rank, len(labels) - HELD_OUT, world)

    torch.manual_seed(0)  # the same first weights on every rank
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    forward_backward(model, images[:BATCH], labels[:BATCH])  # torch's first one is slow
    optimizer.zero_grad()

    checkpoint: Path = arguments.checkpoint
    if attempt == 0 and rank == 0:
        # An earlier run's: with a static rendezvous, torchrun calls them all "none".
        checkpoint.unlink(missing_ok=True)
    dist.barrier()
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        if rank == 0:
            print(f"attempt {attempt}: resumed from step {first}", flush=True)

    for step in range(first, arguments.steps):
        chance = torch.Generator().manual_seed(step)
        batch = mine[torch.randint(len(mine), (BATCH,), generator=chance)]
        hangs = attempt == 0 and rank == arguments.hang_rank and step == arguments.hang_at_step
        with hangwatch.expires(after=arguments.limit, scope="forward"):
            if hangs:
                stop_in_c()
            loss = forward_backward(model, images[batch], labels[batch])
        with hangwatch.expires(after=30, scope="all_reduce"):
            average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if rank == 0 and done % CHECKPOINT_EVERY == 0:
            state = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, state)
            print(f"attempt {attempt}: step {done}, loss {loss:.3f}", flush=True)

    if rank == 0:
        with torch.no_grad():
            right = model(images[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]
        accuracy = right.float().mean()
        came = f"resumed from step {first}" if first else "trained in one go"
        print(f"finished: accuracy {accuracy:.3f} of {HELD_OUT} unseen digits, {came}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start me with torchrun; see the docstring.")
    parser.add_argument("--hang-rank", type=int, help="the rank that hangs (default: none)")
    parser.add_argument("--hang-at-step", type=int, default=20, help="where (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=2, help="a step's, s (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("checkpoints", f"ddp_digits-{run}.pt"),
        help="what a restart goes on from; a new run replaces it (default: %(default)s)",
    )
    arguments = parser.parse_args()
    arguments.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    # torchrun keeps its store over a restart, with the addresses of the dead in it: every
    # attempt gets keys of its own. See https://github.com/pytorch/pytorch/issues/135712
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {arguments.attempt}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    train(arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # No destructors: now and then one of gloo's threads still lets go of a tensor, and aborts
    # an interpreter that is ending. See https://github.com/pytorch/pytorch/pull/179291
    sys.stdout.flush()
    os._exit(0)
