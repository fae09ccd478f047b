"""Asks a cloud's metadata service whether this machine is about to be taken away.

Owns the two protocols: AWS spot (IMDSv2, two minutes' notice) and Google Compute Engine (30 seconds').
An unreachable service is no notice.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable

_TIMEOUT_S = 2.0
_AWS, _GCP = "http://169.254.169.254", "http://metadata.google.internal"


def aws(base: str = _AWS) -> bool:
    """Whether a spot interruption has been announced: `spot/instance-action` exists then."""
    token = _asked(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, method="PUT")
    if token is None:
        return False
    return _asked(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) is not None


def gcp(base: str = _GCP) -> bool:
    """Whether the instance is being preempted."""
    answer = _asked(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return answer is not None and answer.strip().upper() == "TRUE"


def source(name: str, url: str | None) -> Callable[[], bool]:
    """`aws`, `gcp` or `none`; url stands in for the service's address."""
    if name == "none":
        return lambda: False
    ask, usual = (aws, _AWS) if name == "aws" else (gcp, _GCP)
    return lambda: ask(url or usual)


def _asked(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text; None when there is none."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Metadata addresses are link-local: a proxy that is set for the outside must not be asked for them.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode(errors="replace"))
    except (urllib.error.URLError, OSError, ValueError):
        return None
