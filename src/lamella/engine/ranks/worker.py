"""Process of a tensor-parallel rank other than 0: `python -m lamella.engine.ranks.worker FD`, FD being a socket.

A worker builds the same engine as rank 0 around its shard of the model, and executes the steps that rank 0 sends. It
exits as soon as the socket is closed, even in the middle of a step.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

import torch

from lamella.checkpoint import open_checkpoint
from lamella.engine.loading import build_engine, load_shard
from lamella.engine.options import EngineOptions
from lamella.engine.ranks.messages import Alive, Channel, Failed, Ready, Start, Step, Switch
from lamella.engine.ranks.step_messages import StepDecoder
from lamella.engine.ranks.workers import Workers
from lamella.models.registry import register_architecture
from lamella.parallel.group import TensorParallelGroup
from lamella.parallel.sharding import Partition

logger = logging.getLogger("lamella")

_ALIVE_SECONDS = 2.0


def main() -> None:
    """Run a worker on the socket of the command line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; rank 0 handles it
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    folder: list[str] = []  # of rank 0, once it is known
    threading.Thread(target=_keep_contact, args=(channel, folder), daemon=True).start()
    try:
        start = channel.receive()
        assert isinstance(start, Start)
        folder.append(start.folder)
        logging.basicConfig(format=f"[rank {start.rank}] %(levelname)s: %(message)s")
        logger.setLevel(start.log_level)
        run(start, channel)
    except EOFError:
        _exit_without_rank_0(folder)
    except Exception as error:
        logger.debug("the worker ends", exc_info=True)
        lines = str(error).strip().splitlines() or [""]
        try:
            channel.send(Failed(f"{type(error).__name__}: {lines[0]}"))
        except OSError:
            _exit_without_rank_0(folder)
        os._exit(1)  # a normal exit could wait for collective operations of the other ranks


def run(start: Start, channel: Channel) -> None:
    """Build the engine of this rank, and execute steps until the channel is closed.

    Raises:
        EOFError: the channel is closed.
    """
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
    decoder = StepDecoder(engine.state)
    while True:
        step = channel.receive()
        if isinstance(step, Switch):
            if not options.mixed_placements:
                decoder.end_all()
            engine.variants.apply(step.variant)
            if not options.mixed_placements:
                decoder = StepDecoder(engine.state)
            continue
        assert isinstance(step, Step)
        chunks = decoder.decode(step)
        engine.memory.copy_slots(step.copies)
        engine.runner.launch(chunks)


def _keep_contact(channel: Channel, folder: list[str]) -> None:
    """Tell rank 0 every few seconds that this process runs, and end the process when rank 0 has ended.

    Rank 0 cannot remove its folder if it was killed, so that its workers do.
    """
    poll = select.poll()
    poll.register(channel.fd, 0)  # an empty event mask: hang-ups are always reported
    try:
        while not poll.poll(1000 * _ALIVE_SECONDS):
            channel.send(Alive())
    except OSError:
        pass
    _exit_without_rank_0(folder)


def _exit_without_rank_0(folder: list[str]) -> NoReturn:
    for each in folder:
        shutil.rmtree(each, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
