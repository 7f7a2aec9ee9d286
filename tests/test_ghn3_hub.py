"""GHN-3 by name, from a Hub repository laid out as that of its authors: joblib's files in large-file storage."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import joblib
import pytest
from ghn_reference import ghn3_config, released_ghn3, seeded_ghn3
from hub_client import Client, Failed
from hub_server import Blob, Hub, Repository, Response

from timm_ghn.ghn import GHN, content_hash
from timm_ghn.ghn.registry import GHN3

LOAD = "ghn = timm_ghn.load_ghn('ghn3-t'); result = [ghn.info.name, ghn.info.hash]"


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn3(ghn3_config(16, 2, 4, num_classes=10))


def publish(hub: Hub, content: Any, compress: Any = 3) -> bytes:
    """Put a file into the repository."""
    buffer = io.BytesIO()
    joblib.dump(content, buffer, compress=compress)
    found = hub.repositories.setdefault(GHN3, Repository())
    blob = Blob(buffer.getvalue(), True)
    hub.objects[blob.sha256] = blob.data
    found.commit("main", {**found.files, "ghn3tm8.pt": blob}, "upload")
    return blob.data


def kept(client: Client) -> list[str]:
    """Files of GHNs in the cache of the process."""
    folder = Path(client.home) / "cache" / "ghns"  # type: ignore[attr-defined]
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def refused(client: Client, environment: dict[str, str | None] | None = None) -> str:
    with pytest.raises(Failed) as caught:
        client.run(LOAD, environment)
    assert {"DownloadError", "CheckpointError"} & set(caught.value.kinds), caught.value.trace
    assert "\n" not in str(caught.value)
    assert kept(client) == []
    return str(caught.value)


def test_it_is_downloaded_once_and_converted(hub: Hub, client: Client, ghn: GHN) -> None:
    publish(hub, released_ghn3(ghn))
    assert client.run(LOAD).result == ["ghn3-t", content_hash(ghn)]
    assert kept(client) == ["ghn3-t.safetensors"]
    hub.requests.clear()
    assert client.run(LOAD, {"HF_HUB_OFFLINE": "1"}).result == ["ghn3-t", content_hash(ghn)]
    assert hub.requests == []


def test_it_initializes_models_as_any_other_ghn(hub: Hub, client: Client, ghn: GHN) -> None:
    publish(hub, released_ghn3(ghn))
    code = (
        "a = timm.create_model('test_vit', init='ghn-orth')\n"
        "b = timm.create_model('test_vit', init=timm_ghn.Init('ghn-orth', ghn='ghn3-t', cache=False))\n"
        "same = all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))\n"
        "note = timm_ghn.report_of(a).table().splitlines()[-1]\n"
        "result = [timm_ghn.provenance(a)['ghn'], timm_ghn.provenance(b)['ghn_hash'], same, note]"
    )
    note = "L, the noise and the scale rule are those of GHN-2: nothing is published for GHN-3."
    assert client.run(code, {"TIMM_GHN": "ghn3-t"}).result == ["ghn3-t", content_hash(ghn), True, note]


def test_revisions_have_files_of_their_own(hub: Hub, client: Client, ghn: GHN) -> None:
    publish(hub, released_ghn3(ghn))
    first = hub.repositories[GHN3].refs["main"]
    other = seeded_ghn3(ghn3_config(8, 1, 2, num_classes=10))
    publish(hub, released_ghn3(other))
    old, new = (LOAD.replace("'ghn3-t'", repr(name)) for name in (f"ghn3-t@{first}", "ghn3-t"))
    assert client.run(old).result == [f"ghn3-t@{first}", content_hash(ghn)]
    assert client.run(new).result == ["ghn3-t", content_hash(other)]
    assert kept(client) == ["ghn3-t.safetensors", f"ghn3-t@{first}.safetensors"]


def test_a_truncated_download_is_refused(hub: Hub, client: Client, ghn: GHN) -> None:
    data = publish(hub, released_ghn3(ghn))

    def cut(response: Response) -> Response:
        response.cut = len(data) // 2
        return response

    hub.change("GET", "/cdn/", cut)
    assert "GHN ghn3-t could not be fetched from hf-hub:SamsungSAILMontreal/ghn3/ghn3tm8.pt" in refused(client)


def test_another_content_is_refused(hub: Hub, client: Client, ghn: GHN) -> None:
    data = publish(hub, released_ghn3(ghn))
    hub.objects[Blob(data, True).sha256] = data[:-1] + b"?"
    assert "You can put the file there by hand" in refused(client)
    hub.objects[Blob(data, True).sha256] = data + b"more"
    assert "could not be fetched" in refused(client)


def test_a_missing_file_and_no_network_are_told_apart(hub: Hub, client: Client) -> None:
    hub.repositories[GHN3] = Repository()
    assert "there is no such file" in refused(client) or "there is no file" in refused(client)
    assert "it is not on disk" in refused(client, {"HF_HUB_OFFLINE": "1"})
    hub.repositories.clear()
    assert "there is no such repository" in refused(client)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("false",)


def test_a_hostile_file_is_refused(hub: Hub, client: Client, ghn: GHN) -> None:
    publish(hub, {**released_ghn3(ghn), "extra": Payload()})
    assert "pickled code or objects, which are never run" in refused(client)
    publish(hub, {"ln.weight": ghn.ln.weight})
    assert "no 'config', and no tensor 'embed.weight'" in refused(client)


def test_a_full_disk_is_survived_with_a_warning(hub: Hub, client: Client, ghn: GHN, tmp_path: Path) -> None:
    publish(hub, released_ghn3(ghn))
    (tmp_path / "file").write_text("in the way")
    done = client.run(LOAD, {"TIMM_GHN_CACHE": str(tmp_path / "file")})
    assert done.result == ["ghn3-t", content_hash(ghn)]
    assert "Cannot keep GHN ghn3-t" in done.err


def test_a_file_put_there_by_hand_is_converted(hub: Hub, client: Client, ghn: GHN) -> None:
    folder = Path(client.home) / "cache" / "ghns"  # type: ignore[attr-defined]
    folder.mkdir(parents=True)
    joblib.dump(released_ghn3(ghn), folder / "ghn3tm8.pt")
    assert client.run(LOAD, {"HF_HUB_OFFLINE": "1"}).result == ["ghn3-t", content_hash(ghn)]
    assert kept(client) == ["ghn3-t.safetensors", "ghn3tm8.pt"]
