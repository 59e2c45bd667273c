"""The process of a rank other than 0: `python -m lamella.engine.ranks.worker FD`, the end of a socket pair.

It makes the engine that rank 0 makes, of its own part of the model, and runs the steps that rank 0 tells it. It ends
when the socket closes, whatever it is doing then.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

from lamella.checkpoint import open_checkpoint
from lamella.engine.loading import build_engine, load_shard
from lamella.engine.options import EngineOptions
from lamella.engine.ranks.messages import Channel, Failed, Ready, Start, Step, Switch, wait_for_hang_up
from lamella.engine.ranks.step_messages import Replayer
from lamella.engine.ranks.workers import Workers
from lamella.models.registry import register_architecture
from lamella.parallel.group import TensorParallelGroup
from lamella.parallel.sharding import Partition

logger = logging.getLogger("lamella")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the terminal's is rank 0's to handle
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    try:
        start = channel.receive()
        assert isinstance(start, Start)
        logging.basicConfig(format=f"[rank {start.rank}] %(levelname)s: %(message)s")
        logger.setLevel(start.log_level)
        run(start, channel)
    except EOFError:
        os._exit(0)
    except Exception as error:
        logger.debug("the worker ends", exc_info=True)
        lines = str(error).strip().splitlines() or [""]
        with suppress(OSError):
            channel.send(Failed(f"{type(error).__name__}: {lines[0]}"))
        os._exit(1)  # an orderly exit might wait for the other ranks


def run(start: Start, channel: Channel) -> None:
    """Make this rank's engine, and take its steps until the channel closes, which raises `EOFError`."""
    torch.set_num_threads(start.threads)
    for name, path in start.architectures.items():
        register_architecture(name, path)
    options = EngineOptions(**start.options)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", start.rank)
        torch.cuda.set_device(device)
    group = TensorParallelGroup(Partition(start.rank, start.size))
    model = load_shard(
        open_checkpoint(str(options.model), options.hf_overrides, options.revision), options, device, group
    )
    channel.send(Ready())
    group.connect(Path(start.folder), device)
    engine = build_engine(model, options, device, workers=Workers(group))
    replayer = Replayer(engine.state)
    while True:
        step = channel.receive()
        if isinstance(step, Switch):
            if not options.mixed_placements:
                replayer.end_all()
            engine.variants.apply(step.variant)
            if not options.mixed_placements:
                replayer = Replayer(engine.state)
            continue
        assert isinstance(step, Step)
        shares = replayer.replay(step)
        engine.memory.copy_slots(step.copies)
        engine.runner.launch(shares)


def _end_with(channel: Channel) -> None:
    wait_for_hang_up([channel])
    os._exit(0)


if __name__ == "__main__":
    main()
