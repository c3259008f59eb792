"""An S3 server of this machine: moto's, which keeps everything in memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from orchestrator.filesystem import Folder


class Server:
    """An S3 server with one empty bucket."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"s3://bucket/checkpoints?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
        Folder.of(f"{self.uri}&allow_bucket_creation=true", "bucket").create()

    def parts(self) -> int:
        """How many parts have arrived of uploads that have not ended."""
        import boto3  # comes with moto

        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1")
        uploads = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        listings = [client.list_parts(Bucket="bucket", Key=u["Key"], UploadId=u["UploadId"]) for u in uploads]
        return sum(len(listing.get("Parts", [])) for listing in listings)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
