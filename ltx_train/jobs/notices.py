"""Queries a cloud's metadata service for a preemption notice of this machine.

Owns two protocols: AWS spot (IMDSv2, two minutes' notice) and Google Compute Engine (30 seconds' notice).
An unreachable service counts as no notice.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable

_TIMEOUT_S = 2.0
_AWS, _GCP = "http://169.254.169.254", "http://metadata.google.internal"


def aws(base: str = _AWS) -> bool:
    """Whether a spot interruption has been announced: `spot/instance-action` exists then."""
    token = _response(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, method="PUT")
    if token is None:
        return False
    return _response(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) is not None


def gcp(base: str = _GCP) -> bool:
    """Whether the instance is being preempted."""
    answer = _response(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return answer is not None and answer.strip().upper() == "TRUE"


def source(name: str, url: str | None) -> Callable[[], bool]:
    """The query of a service (aws, gcp or none). url: replaces the service's address."""
    if name == "none":
        return lambda: False
    query, default = (aws, _AWS) if name == "aws" else (gcp, _GCP)
    return lambda: query(url or default)


def _response(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The text of the response; None when the request fails."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Metadata addresses are link-local, so the request must bypass a configured proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode(errors="replace"))
    except (urllib.error.URLError, OSError, ValueError):
        return None
