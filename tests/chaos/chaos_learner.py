"""A learner without a model: reads groups, commits them, announces versions. ``learn.mode`` beside the config makes it misbehave."""

import sys
import time
from dataclasses import replace
from pathlib import Path

from agentrl.assembly.parts import run_dir_of, stream_url
from agentrl.assembly.watchdog import LearnStatus, Watchdog
from agentrl.config import load_config
from agentrl.stream.connection import connect
from agentrl.stream.consumer import TrajectoryConsumer
from agentrl.stream.keys import Keys
from agentrl.telemetry.logs import setup_logging
from agentrl.types import PolicyRecord
from agentrl.weights.digest import weights_digest


def main(config_path: str) -> None:
    config = load_config(config_path)
    directory = run_dir_of(config).create()
    setup_logging("learn", "INFO")
    directory.register("learn")
    mode_file = Path(config_path).parent / "learn.mode"
    model = Path(config.model.path)
    with (
        connect(stream_url(config, directory), role="learn") as client,
        LearnStatus(directory, watchdog=Watchdog(directory, config)) as status,
    ):
        consumer = TrajectoryConsumer(client, Keys(config.run.name), patience_s=None)
        epoch = consumer.acquire()
        record = PolicyRecord(run_epoch=epoch, version=0, path=str(model), digest=weights_digest(model))
        consumer.publish_policy(record, consumed_groups=consumer.committed_groups)
        quiet_since = time.monotonic()
        version = 0
        while True:
            mode = mode_file.read_text().strip() if mode_file.is_file() else ""
            if mode == "announce":  # once: the next policy, with the same weights
                version += 1
                mode_file.write_text("")
                consumer.publish_policy(replace(record, version=version), consumed_groups=consumer.committed_groups)
            if mode == "step":  # computes for ever
                status.does("step")
                time.sleep(0.05)
                continue
            group = consumer.next_group(0.2)
            if group is None:
                outage_s = consumer.outage_s
                status.waits("stream" if outage_s else "group", outage_s or time.monotonic() - quiet_since)
                continue
            quiet_since = time.monotonic()
            status.moved(version=version)
            if mode != "hold":  # holds what it read, as before a checkpoint that never comes
                consumer.commit([group.close.id], outcomes={})
                consumer.report_progress(consumer.committed_groups)


if __name__ == "__main__":
    main(sys.argv[1])
