"""Names and what answers under them, changed while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path

from lighten.errors import UserError
from lighten.serving import adapters
from lighten.serving.adapters import Base, Model
from lighten.serving.engine import Adapter, Engine
from lighten.serving.requests import Refused

log = logging.getLogger(__name__)


class Registry:
    """The base and its adapters by name.

    Args:
        base: The base.
        name: What clients call it.
        root: Folder that adapters may be loaded from at run time; None: from nowhere.
        most: Adapters at most.
    """

    def __init__(self, base: Base, name: str, *, root: Path | None, most: int) -> None:
        self.base, self.name, self._most = base, name, most
        self._root = None if root is None else root.resolve()
        first = Model(name, base.asking, None, adapters.now())
        self.models: dict[str, Model] = {name: first}
        self._changing = asyncio.Lock()
        # Models as long as somebody holds one: a request that was taken under a name is answered
        # by what had the name then, even if it is loaded anew before the engine hears of it.
        self._in_use: weakref.WeakSet[Model] = weakref.WeakSet()
        self._settling: set[asyncio.Task[None]] = set()

    def open(self, folders: Mapping[str, Path]) -> None:
        """Take the adapters that are there from the start.

        Raises:
            UserError: What is wrong with each that cannot be served.
        """
        problems = []
        for name, folder in folders.items():
            try:
                self._require_free(name, folder)
                self.models[name] = adapters.open_adapter(name, folder, self.base)
                self._in_use.add(self.models[name])
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))

    def _require_free(self, name: str, folder: Path | None = None) -> None:
        if name == self.name:
            raise UserError(f"{name!r} is the base's name; give the adapter another one")
        adapters.require_name(name, folder)

    @property
    def vocabulary(self) -> int:
        """Tokens that the base knows."""
        size: int = self.base.config.get_text_config().vocab_size
        return size

    @property
    def adapters(self) -> list[Adapter]:
        """What the engine has to hold, each once: what is served, and what answers still take."""
        models = [*self.models.values(), *self._in_use]
        return list(
            {model.adapter.key: model.adapter for model in models if model.adapter}.values()
        )

    def named(self, name: str, adapter: str | None = None) -> Model:
        """The model of a request.

        Raises:
            Refused: There is none of this name.
        """
        if adapter is not None and name != self.name and name != adapter:
            raise Refused(400, "adapter_id and model name two adapters; leave one out",
                          "adapter_id")  # fmt: skip
        model_name = adapter or name
        if model_name not in self.models:
            model_name = adapters.spelt(model_name)
        if model_name not in self.models:
            served = ", ".join(list(self.models)[:20]) + ", …" * (len(self.models) > 20)
            raise Refused(404, f"the model {model_name[:200]!r} is not served here; "
                          f"there are: {served}", "adapter_id" if adapter else "model",
                          "model_not_found")  # fmt: skip
        return self.models[model_name]

    async def load(self, name: str, path: str, engine: Engine) -> str:
        """Serve one more adapter, or a newer state of one; says what happened.

        Raises:
            Refused: Its path lies elsewhere, or it cannot be served.
        """
        try:
            self._require_free(name)
        except UserError as error:
            raise Refused(400, str(error), "lora_name") from error
        folder = self._adapter_inside(path)
        async with self._changing:
            previous = self.models.get(name)
            if previous is None and len(self.models) > self._most:
                raise Refused(409, f"there are {self._most} adapters already, which is the limit "
                              "(--max-cpu-loras); unload one first", "lora_name")  # fmt: skip
            try:
                model = await asyncio.to_thread(adapters.open_adapter, name, folder, self.base)
            except UserError as error:
                raise Refused(400, str(error), "lora_path") from error
            if previous is not None and previous.adapter == model.adapter:
                return f"{name} is loaded already, as it is now"
            self._in_use.add(model)
            try:
                await engine.set_adapters(self.adapters)  # this one is held, too
            except UserError as error:
                self._in_use.discard(model)
                raise Refused(400, str(error), "lora_path") from error
            self.models = {**self.models, name: model}
            message = f"{name} is loaded" if previous is None else f"{name} is loaded anew"
            del previous  # the engine forgets it now, unless an answer takes it
            self._forget_with_their_answers(engine)
            await engine.set_adapters(self.adapters)
            return message

    async def unload(self, name: str, engine: Engine) -> str:
        """Serve an adapter no more; its answers in progress go on.

        Raises:
            Refused: There is none of this name.
        """
        async with self._changing:
            if name == self.name or name not in self.models:
                raise Refused(404, f"no adapter is called {name[:200]!r}", "lora_name",
                              "model_not_found")  # fmt: skip
            self.models = {key: model for key, model in self.models.items() if key != name}
            self._forget_with_their_answers(engine)
            await engine.set_adapters(self.adapters)
            return f"{name} is unloaded"

    def _forget_with_their_answers(self, engine: Engine) -> None:
        """Let the engine give up what answers alone still take, when the last of them has ended."""
        loop, served = asyncio.get_running_loop(), set(self.models.values())

        def ended() -> None:  # in whichever thread let go of it
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self._settle, engine)

        for model in list(self._in_use):
            if model not in served:
                weakref.finalize(model, ended).atexit = False

    def _settle(self, engine: Engine) -> None:
        async def settle() -> None:
            async with self._changing:
                if engine.obstacle() is None:
                    await engine.set_adapters(self.adapters)

        task = asyncio.create_task(settle())
        self._settling.add(task)
        task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("an adapter that nothing takes any more stays in memory: %s", error)

    def _adapter_inside(self, path: str) -> Path:
        """The folder of the one adapter at a path below the root: its own, or a run's."""
        try:
            folders = adapters.resolve([str(self._inside(path))])
        except UserError as error:
            raise Refused(400, str(error), "lora_path") from error
        if len(folders) > 1:
            names = ", ".join(list(folders)[:20])
            raise Refused(400, f"{path[:200]!r} holds {len(folders)} adapters; give the folder of "
                          f"one: {names}", "lora_path")  # fmt: skip
        (folder,) = folders.values()
        return self._inside(str(folder))

    def _inside(self, path: str) -> Path:
        """A folder below the root, links followed."""
        if self._root is None:
            raise Refused(403, "this server loads no adapters; start it with --adapter-dir FOLDER",
                          "lora_path")  # fmt: skip
        try:
            folder = (self._root / path).resolve()
            is_folder = folder.is_dir()
        except (OSError, ValueError) as error:  # a null character, a loop of links, too long
            raise Refused(400, "lora_path is no path", "lora_path") from error
        if self._root not in folder.parents:
            raise Refused(403, "lora_path lies outside the folder that adapters may be loaded from",
                          "lora_path")  # fmt: skip
        if not is_folder:
            raise Refused(404, f"there is no folder {path[:200]!r} in the adapters' folder",
                          "lora_path")  # fmt: skip
        return folder
