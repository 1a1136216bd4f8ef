"""Several processes: the same images, hence the same weights, as one process with a larger batch."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from arcore.training.shard import shard

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, warnings
import torch
from torch import nn
from arcore.data import load_digits
from arcore.training import Task, TrainConfig, fit

class Linear(Task):
    saved = ("model",)

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss(self, images, labels):
        return nn.functional.cross_entropy(self.model(images), labels), {}

    def meta(self):
        return {}

out, devices, strategy, batch_size = sys.argv[1:]
config = TrainConfig(steps=8, batch_size=int(batch_size), accelerator="cpu", devices=devices,
                     strategy=strategy, checkpoint_every=0)
result = fit(Linear(config), load_digits("train"), out, show_progress=False)
assert result.rank == int(__import__("os").environ.get("LOCAL_RANK", 0))
"""


LOOPBACK = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, strategy):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = []
    for devices, how, batch_size in (("1", "auto", "16"), ("2", strategy, "8")):
        out = tmp_path / devices
        subprocess.run(
            [sys.executable, str(script), str(out), devices, how, batch_size],
            check=True,
            timeout=120,
            env=LOOPBACK,
        )
        results.append(load_file(out / "step-00000008" / "model.safetensors"))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_machines_equal_one_with_twice_the_batch(tmp_path):
    """Two nodes of one process each, on the loopback interface, started as docs/training.md says."""
    words = [
        sys.executable,
        "-m",
        "arcore",
        "train",
        "msvq_tiny",
        "--steps",
        "6",
        "--accelerator",
        "cpu",
        "--devices",
        "1",
    ]
    one = [*words, "--batch-size", "16", "--out", str(tmp_path / "one")]
    subprocess.run(one, check=True, timeout=120, env=LOOPBACK, capture_output=True)
    two = [
        *words,
        "--batch-size",
        "8",
        "--num-nodes",
        "2",
        "--strategy",
        "ddp",
        "--out",
        str(tmp_path / "two"),
    ]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [
        subprocess.Popen(
            two,
            env=LOOPBACK | place | {"NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "checkpoint:" in outputs[0][0]
    assert outputs[1][0] == "", "the second machine has nothing to report"
    left, right = (
        load_file(tmp_path / name / "step-00000006" / "tokenizer.safetensors") for name in ("one", "two")
    )
    # Codes that are used little restart at vectors of the batch that a process sees; AdamW turns rounding into steps.
    names = [name for name in left if name.startswith(("encoder", "decoder"))]
    assert len(names) > 20
    far = sum(int(((left[name] - right[name]).abs() > 1e-3).sum()) for name in names)
    assert far < 0.01 * sum(left[name].numel() for name in names)


def test_a_sharded_network_is_moved_as_lightning_moves_it_and_trained(tmp_path):
    """On one process: torch's own methods, such as the `reshard` that `to` calls, gather nothing."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        whole = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        network = copy.deepcopy(whole)
        shard(network, init_device_mesh("cpu", (1,)))
        network.to("cpu")
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        inputs = torch.randn(2, 2, 2)
        whole(inputs).square().sum().backward()
        network(inputs).square().sum().backward()
        network.to("cpu")
        for one, other in zip(whole.parameters(), network.parameters(), strict=True):
            assert isinstance(other, DTensor)
            torch.testing.assert_close(other.grad.full_tensor(), one.grad)
    finally:
        dist.destroy_process_group()


SHARDED = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from arcore.catalog import create_model, list_models, save_checkpoint
from arcore.training.shard import shard
from tests.zoo.conftest import protocol

folder, presets = Path(sys.argv[1]), sys.argv[2:] or list_models("*_tiny")
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))


def losses(network, adapter):
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        loss = adapter.loss(network)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


for preset in presets:
    # Both processes see the same batch, so the mean of their gradients is that of one process.
    torch.manual_seed(0)
    adapter = protocol(preset)
    torch.manual_seed(1)
    whole, network = create_model(preset).train(), create_model(preset).train()
    network.load_state_dict(whole.state_dict())
    if not getattr(network, "shardable", True):
        try:
            shard(network, mesh)
        except ValueError as error:
            assert "cannot be sharded" in str(error)
            print(f"{preset}: refused", flush=True)
            continue
        raise AssertionError(preset)
    expected = losses(whole, adapter)
    shard(network, mesh)
    got = losses(network, adapter)
    far = max(abs(one - other) for one, other in zip(expected, got))
    assert far <= 1e-5 * max(1.0, *map(abs, expected)), (preset, expected, got)
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        again = create_model(preset)
        again.load_state_dict(state)
        save_checkpoint(folder / preset, {"model": again}, {})
        read = create_model(preset, weights=folder / preset)
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(read.state_dict()[key], value, rtol=0, atol=1e-4)
        print(f"{preset}: {far:.1e}", flush=True)
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_zoo_models_train_as_whole_ones_do(tmp_path):
    """`fully_shard` on two gloo processes: the losses of one process to 1e-5, and weights that `create_model` reads."""
    from arcore.catalog import list_models

    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    # The contracts' batches are in the tests.
    place["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
            env=LOOPBACK | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=880) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    done = {line.partition(":")[0] for line in outputs[0][0].splitlines()}
    assert done == set(list_models("*_tiny"))
