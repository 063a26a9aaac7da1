"""Drives one upgrade through PyPI's qemu.qmp: argument 1 is the QMP socket."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(path: str) -> None:
    client = QMPClient("test")
    await client.connect(path)
    assert (await client.execute("query-status"))["status"] == "running"
    events = [{"capability": "events", "state": True}]
    await client.execute("migrate-set-capabilities", {"capabilities": events})
    try:
        await client.execute("migrate")
        raise AssertionError("mode normal was not refused")
    except ExecuteError as error:
        assert "need either" in str(error), error
    await client.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    seen = []
    with client.listener(("STOP", "RESUME", "MIGRATION")) as listener:
        await client.execute("migrate")
        async for event in listener:
            seen.append(event.get("data", {}).get("status", event["event"]))
            if seen[-1] in ("completed", "failed", "cancelled"):
                break
    assert seen == ["setup", "STOP", "active", "device", "RESUME", "completed"], seen
    info = await client.execute("query-migrate")
    assert info["status"] == "completed" and info["downtime"] > 0, info
    # An id of the client's own library, and an out-of-band command.
    assert await client.execute("query-yank", oob=False) == []
    await client.disconnect()
    print("completed")


asyncio.run(main(sys.argv[1]))
