"""What images need without a daemon: a store, a content store, a snapshotter, and the image store on them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from criserver.images import ContentStore, Image, ImagePolicy, Images, Platform, RegistrySettings, host_platform
from criserver.store import Store
from snapshotter import Snapshotter


class Rooms:
    """Opened again on the same directory it is what a restarted daemon sees. Needs a running event loop."""

    def __init__(
        self,
        root: str,
        platform: Platform | None = None,
        settings: RegistrySettings | None = None,
        policy: ImagePolicy | None = None,
        note: str = "",
    ) -> None:
        os.makedirs(root, exist_ok=True)
        self.root = root
        self.certs = os.path.join(root, "certs.d")
        self.store = Store(os.path.join(root, "db"))
        self.content = ContentStore(os.path.join(root, "content"))
        self.snapshotter = Snapshotter(os.path.join(root, "snapshots"))
        settings = replace(settings or RegistrySettings(), config_path=self.certs)
        self.platform = platform or host_platform()
        self.images = Images(self.store, self.content, self.snapshotter, settings, self.platform, policy, note)

    def close(self) -> None:
        """End the threads and close the database."""
        self.snapshotter.close()
        self.store.close()

    def configure(self, domain: str, text: str) -> None:
        """Write the domain's hosts.toml."""
        os.makedirs(os.path.join(self.certs, domain), exist_ok=True)
        with open(os.path.join(self.certs, domain, "hosts.toml"), "w") as f:
            f.write(text)

    def change(self, **settings: Any) -> None:
        """Have other settings from the next pull on; ``max_downloads`` stays."""
        self.images._registries = replace(self.images._registries, **settings)

    def leftovers(self) -> list[str]:
        """Files, layers and records on disk: none where there is no image."""
        found = [name for _, _, names in os.walk(os.path.join(self.root, "content")) for name in names]
        for directory in ("layers", "staging", "active"):
            found += os.listdir(os.path.join(self.root, "snapshots", directory))
        return [*found, *(key for table in ("images", "image_names") for key, _ in self.store.items(table))]

    def read(self, image: Image, path: str) -> bytes:
        """A file of the image, from the topmost layer that has it."""
        chain: str | None = image.chain_id
        while chain is not None:
            layer = self.snapshotter.layers()[chain]
            if os.path.exists(f"{layer.path}/fs/{path}"):
                with open(f"{layer.path}/fs/{path}", "rb") as f:
                    return f.read()
            chain = layer.parent
        raise FileNotFoundError(path)
