"""The network of a cluster: addresses, and the cable from this machine to the head."""

import subprocess
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Network:
    """198.18.NUMBER.0/24, out of a range that is reserved for tests."""

    number: int

    @classmethod
    def connect(cls, head: int) -> Self:
        """Lay a cable from this machine to the network of process `head`, where its end is named `outside`.

        The number is the first that no other cluster has. Raises subprocess.CalledProcessError.
        """
        number = 1
        while (done := _add_cable(cls(number), head)).returncode:
            if "File exists" not in done.stderr:
                done.check_returncode()
            number += 1
        network = cls(number)
        subprocess.run(["ip", "addr", "add", f"{network.outside}/24", "dev", network.cable], check=True)
        subprocess.run(["ip", "link", "set", network.cable, "up"], check=True)
        return network

    def disconnect(self) -> None:
        """Take the cable away, if it has not gone with the head's network."""
        subprocess.run(["ip", "link", "delete", self.cable], capture_output=True)

    @property
    def cable(self) -> str:
        """Name of this machine's end of the cable."""
        return f"slurm{self.number}"

    @property
    def outside(self) -> str:
        """Address of this machine."""
        return f"198.18.{self.number}.254"

    @property
    def head(self) -> str:
        """Address of the controller and the accounting."""
        return f"198.18.{self.number}.1"

    def node(self, name: str) -> str:
        """Address of a node."""
        return f"198.18.{self.number}.{10 + int(name.removeprefix('node'))}"

    def card(self, name: str) -> str:
        """Hardware address of a node or the head: the same after it was off, or others could not reach it at once."""
        place = 1 if name == "head" else 10 + int(name.removeprefix("node"))
        return f"02:00:00:00:{self.number:02x}:{place:02x}"


def _add_cable(network: Network, head: int) -> subprocess.CompletedProcess[str]:
    peer = ["peer", "name", "outside", "netns", str(head)]
    command = ["ip", "link", "add", "name", network.cable, "type", "veth", *peer]
    return subprocess.run(command, capture_output=True, text=True)
