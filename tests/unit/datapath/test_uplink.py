"""What the host's settings are made to be, with devices that come and go meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.datapath import uplink


def test_forwarding_begins_though_a_device_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "ipv6/conf"
    gone = conf / "gone/accept_ra"
    for file in (gone, conf / "eth0/accept_ra", conf / "zeth0/accept_ra", conf / "all/accept_ra"):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    (conf / "all/forwarding").write_text("0\n")
    real = Path.read_text

    def too_late(path: Path) -> str:
        if path == gone:
            gone.unlink()
        return real(path)

    monkeypatch.setattr(uplink, "SYSCTL", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", too_late)
        uplink._forward_ipv6()
    assert not gone.exists()
    assert [(conf / name / "accept_ra").read_text() for name in ("eth0", "zeth0")] == ["2", "2"]
    assert (conf / "all/accept_ra").read_text() == "1\n"
    assert (conf / "all/forwarding").read_text() == "1"
