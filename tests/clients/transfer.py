"""Takes a guest to another broker through PyPI's qemu.qmp, as one takes it to another QEMU: arguments are the QMP sockets of the
old and of the new side, and the paths of the main and of the cpr channel. The new side was told to defer."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient

NAMES = ("STOP", "RESUME", "MIGRATION")
EVENTS = {"capabilities": [{"capability": "events", "state": True}]}


def channel(kind: str, path: str) -> dict:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}


async def heard(listener) -> list:
    seen = []
    async for event in listener:
        seen.append(event.get("data", {}).get("status", event["event"]))
        if seen[-1] in ("completed", "failed", "cancelled"):
            return seen
    return seen


async def refused(client: QMPClient, *command) -> str:
    try:
        await client.execute(*command)
    except ExecuteError as error:
        return str(error)
    raise AssertionError(f"{command} was not refused")


async def main(old_path: str, new_path: str, main_path: str, cpr_path: str) -> None:
    old, watcher, new = QMPClient("old"), QMPClient("watcher"), QMPClient("new")
    await old.connect(old_path)
    await watcher.connect(old_path)
    await old.execute("migrate-set-capabilities", EVENTS)
    await old.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    channels = [channel("main", main_path), channel("cpr", cpr_path)]
    with old.listener(NAMES) as of_old, watcher.listener(NAMES) as of_watcher, new.listener(NAMES) as of_new:
        await old.execute("migrate", {"channels": channels, "detach": True})
        assert (await old.execute("query-status"))["status"] == "running"
        # Only now is there a monitor of QEMU's.
        await new.connect(new_path)
        await new.execute("migrate-set-capabilities", EVENTS)
        assert (await new.execute("query-status"))["status"] == "inmigrate"
        await new.execute("migrate-incoming", {"channels": channels[:1]})
        seen = await asyncio.gather(heard(of_old), heard(of_watcher), heard(of_new))
    assert seen[0] == ["setup", "STOP", "active", "device", "completed"], seen
    assert seen[1] == seen[0], seen
    assert seen[2] == ["setup", "active", "RESUME", "completed"], seen
    assert (await old.execute("query-migrate"))["downtime"] > 0
    assert (await old.execute("query-status"))["status"] == "postmigrate"
    assert (await new.execute("query-status"))["status"] == "running"
    assert (await new.execute("query-migrate-parameters"))["mode"] == "normal"
    assert "handed to another broker" in await refused(old, "cont")
    assert "paused due to previous migration" in await refused(old, "migrate", {"channels": channels})
    await old.execute("quit")
    await asyncio.gather(old.disconnect(), watcher.disconnect(), new.disconnect(), return_exceptions=True)
    print("completed")


asyncio.run(main(*sys.argv[1:]))
