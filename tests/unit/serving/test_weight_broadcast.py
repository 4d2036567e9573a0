"""Weights by broadcast against fake servers, over real sender processes and real gloo groups."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agentrl.errors import WeightSyncError
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.serving.weight_broadcast import WeightBroadcaster
from agentrl.serving.weight_reconciler import WeightReconciler
from agentrl.testing.fake_sglang import FakeSGLang
from agentrl.testing.waits import until
from agentrl.types import PolicyRecord
from agentrl.weights.digest import weights_digest

BUCKET_BYTES = 3000


def publish(root: Path, version: int) -> tuple[PolicyRecord, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    tensors = {f"layer{index}": torch.randn(20, 30, generator=generator).to(torch.bfloat16) for index in range(5)}
    tensors["norm"] = torch.randn(30, generator=generator)
    path = root / f"e1-v{version}"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return PolicyRecord(run_epoch=1, version=version, path=str(path), digest=weights_digest(path)), tensors


def assert_holds(server: FakeSGLang, tensors: dict[str, torch.Tensor]) -> None:
    assert server.received.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype, shape, data = server.received[name]
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape), tensor)


class Announced:
    record: PolicyRecord | None = None

    async def read(self) -> PolicyRecord | None:
        return self.record


@asynccontextmanager
async def broadcasting(
    tmp_path: Path, num_servers: int
) -> AsyncGenerator[tuple[list[FakeSGLang], AsyncLLMServerManager, WeightReconciler, WeightBroadcaster, Announced]]:
    servers, announced = [FakeSGLang() for _ in range(num_servers)], Announced()
    async with (
        AsyncLLMServerManager() as manager,
        WeightBroadcaster(bucket_bytes=BUCKET_BYTES, log_dir=tmp_path / "logs") as broadcast,
        asyncio.TaskGroup() as group,
    ):
        reconciler = WeightReconciler(
            manager, read_policy=announced.read, poll_s=0.01, backoff_s=0.01, broadcast=broadcast, mode="retract"
        )
        for server in servers:
            await server.start()
            manager.add_server(server.url)
        running = group.create_task(reconciler.run())
        try:
            yield servers, manager, reconciler, broadcast, announced
        finally:
            running.cancel()
            await asyncio.wait([running])
            for url in manager.urls:
                await broadcast.disconnect(url)
            for server in servers:
                await server.kill()


@pytest.mark.asyncio
async def test_servers_receive_every_tensor_in_buckets_and_a_dead_sender_is_made_good_by_disk(tmp_path: Path) -> None:
    async with broadcasting(tmp_path, 2) as (servers, manager, reconciler, broadcast, announced):

        async def settle(version: int) -> dict[str, torch.Tensor]:
            announced.record, tensors = publish(tmp_path, version)
            await until(lambda: reconciler.target == announced.record and reconciler.is_settled)
            return tensors

        tensors = await settle(0)
        pids = broadcast.sender_pids
        assert set(pids) == {server.url for server in servers}
        for server in servers:
            assert_holds(server, tensors)
            assert server.updates == []
            assert len(server.broadcasts) == 4  # two bfloat16 tensors in each of two, one alone, the float32 one
            assert [body["weight_version"] for body in server.broadcasts] == [None, None, None, "e1-v0"]
            assert [body["flush_cache"] for body in server.broadcasts] == [False, False, False, True]

        tensors = await settle(1)
        for server in servers:
            assert_holds(server, tensors)
        assert broadcast.sender_pids == pids, "groups outlive an update"
        assert [update.transport for update in reconciler.updates] == ["broadcast"] * 4

        # A sender dies in the middle of a broadcast that its server waits in.
        victim, other = servers
        victim.broadcast_delay_s = 1.0
        num_before = len(victim.broadcasts)
        announced.record, tensors = publish(tmp_path, 2)
        await until(lambda: len(victim.broadcasts) > num_before)
        os.kill(pids[victim.url], signal.SIGKILL)
        await until(lambda: reconciler.target == announced.record and reconciler.is_settled)
        assert_holds(other, tensors)
        attempts = [update for update in reconciler.updates if update.version == 2 and update.url == victim.url]
        assert [(update.transport, bool(update.error)) for update in attempts] == [("broadcast", True), ("disk", False)]
        assert "weight sender" in attempts[0].error
        assert victim.updates[-1]["model_path"] == announced.record.path
        assert not victim.is_paused

        # The next version goes by broadcast again, through a new sender.
        victim.broadcast_delay_s = 0.0
        assert_holds(victim, await settle(3))
        assert broadcast.sender_pids[victim.url] != pids[victim.url]
        assert broadcast.sender_pids[other.url] == pids[other.url]
        assert len(victim.updates) == 1

        # A restarted engine lost its group, and is given the weights through a new one.
        await victim.restart_with_base_weights()
        manager.remove_server(victim.url)
        manager.add_server(victim.url)
        await until(lambda: reconciler.is_settled)
        assert victim.label == "e1-v3"
        assert len(victim.received) == 6


@pytest.mark.asyncio
async def test_server_that_cannot_join_is_updated_from_disk_and_left_alone(tmp_path: Path) -> None:
    async with broadcasting(tmp_path, 1) as (servers, _manager, reconciler, broadcast, announced):
        servers[0].layout = {"tp_size": 1, "pp_size": 2, "dp_size": 1}
        for version in range(2):
            announced.record, _ = publish(tmp_path, version)
            await until(lambda: reconciler.target == announced.record and reconciler.is_settled)
        assert [update["weight_version"] for update in servers[0].updates] == ["e1-v0", "e1-v1"]
        assert [(update.transport, update.error) for update in reconciler.updates] == [("disk", "")] * 2
        assert broadcast.sender_pids == {}


@pytest.mark.asyncio
async def test_refused_bucket_ends_the_session_and_the_group_and_says_why(tmp_path: Path) -> None:
    record, tensors = publish(tmp_path, 0)
    async with (
        AsyncLLMServerManager() as manager,
        FakeSGLang() as server,
        WeightBroadcaster(bucket_bytes=BUCKET_BYTES, log_dir=tmp_path / "logs") as broadcast,
    ):
        manager.add_server(server.url)
        client = manager.client(server.url)
        assert await broadcast.connect(client, incarnation=1, send_timeout_s=200)
        server.fail_next_updates()
        with pytest.raises(WeightSyncError, match="scripted"):
            await broadcast.send(client, record, flush_cache=True, timeout_s=200)
        assert broadcast.sender_pids == {}
        assert server.calls["/end_weight_update"] == 1
        assert server.calls["/destroy_weights_update_group"] == 1
        assert server.label == "default"
        assert await broadcast.connect(client, incarnation=1, send_timeout_s=200)
        await broadcast.send(client, record, flush_cache=True, timeout_s=200)
        assert_holds(server, tensors)
