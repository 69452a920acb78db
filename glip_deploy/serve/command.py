"""`glip-serve`: a bundle behind a live page and an HTTP service."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from glip_deploy.backends import PROVIDERS
from glip_deploy.cli import detector_options
from glip_deploy.cli.app import QUIET, VERSION, bad_option, examples, make_app, run_app
from glip_deploy.cli.arguments import LogLevel, at_least, flag, option, seconds, share_of_gpus
from glip_deploy.cli.console import log_lines, say, stderr_for_lines
from glip_deploy.cli.detector_options import HOW
from glip_deploy.errors import MissingPackage, OptionError
from glip_deploy.frames.load import MAX_PIXELS

__all__ = ["main"]

PROGRAM = "glip-serve"
WHERE, LIMITS, REPLICAS = "Where it is reached", "What it takes", "How to run on Ray"

app = make_app()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glip-serve`.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status; see `glip_deploy.cli.app`. SIGTERM and Ctrl-C are its usual ends: 0.
    """
    return run_app(app, PROGRAM, argv, extra="serve")


@app.command(
    epilog=examples(
        "glip-serve --model glip_t",
        "glip-serve --model glip_t --source yard.mp4 --track",
        "glip-serve --model glip_t --host 0.0.0.0 --token SECRET",
        "glip-serve --model glip_t --ray local --replicas 2",
        note="Ctrl-C or SIGTERM ends it, once the requests under way are answered.",
    )
)
def serve(
    *,
    model: Annotated[list[str], option("BUNDLE", "Folder that glip-export wrote; repeatable.")],
    source: Annotated[
        str | None,
        option("SOURCE", "What visitors may watch: a video, which is repeated, a camera number or an address."),
    ] = None,
    track: Annotated[
        bool,
        flag("--track", "In the page's streams: an id for each object that stays with it from frame to frame."),
    ] = False,
    host: Annotated[str, option("HOST", "Name or address to listen on.", WHERE)] = "127.0.0.1",
    port: Annotated[int, option("PORT", "Port; 0 for any that is free.", WHERE, at_least(0, 65535))] = 8000,
    token: Annotated[
        str | None, option("TOKEN", "What clients have to know (or in the variable GLIP_SERVE_TOKEN).", WHERE)
    ] = None,
    insecure: Annotated[bool, flag("--insecure", "Let anybody on the network in without a token.", WHERE)] = False,
    max_bytes: Annotated[
        int, option("N", "Largest picture, as a file.", LIMITS, at_least(1, 2_000_000_000))
    ] = 20_000_000,
    max_pixels: Annotated[int, option("N", "Largest picture, decoded.", LIMITS, at_least(1, MAX_PIXELS))] = 50_000_000,
    max_characters: Annotated[
        int, option("N", "Longest prompt of a request.", LIMITS, at_least(1, 10_000_000))
    ] = 20_000,
    max_prompts: Annotated[int, option("N", "Most prompts of a request.", LIMITS, at_least(1, 1000))] = 16,
    timeout: Annotated[float, option("SECONDS", "Longest time of a request.", LIMITS, seconds)] = 60.0,
    queue: Annotated[
        int, option("N", "Requests under way; one more gets status 429.", LIMITS, at_least(1, 100_000))
    ] = 64,
    drain: Annotated[float, option("SECONDS", "How long requests may go on after SIGTERM.", LIMITS, seconds)] = 30.0,
    batch_size: Annotated[
        int | None,
        option("N", "Most frames looked at together (default: 1 on a CPU, 4 on a GPU).", HOW, at_least(1, 256)),
    ] = None,
    batch_wait: Annotated[
        int, option("MS", "How long a frame waits for others with its prompt.", HOW, at_least(0, 10_000))
    ] = 0,
    workers: Annotated[int, option("N", "Frames, or batches, looked at side by side.", HOW, at_least(1, 64))] = 1,
    shortest_side: detector_options.SHORTEST_SIDE = 800,
    longest_side: detector_options.LONGEST_SIDE = 1333,
    resize: detector_options.RESIZE = None,
    backend: detector_options.BACKEND = "onnxruntime",
    precision: detector_options.PRECISION = None,
    engines: detector_options.ENGINES = None,
    untrusted: detector_options.UNTRUSTED = False,
    no_plugins: detector_options.NO_PLUGINS = False,
    no_verify: detector_options.NO_VERIFY = False,
    threads: detector_options.THREADS = None,
    ray: Annotated[
        str | None,
        option("ADDRESS", "Detect on replicas of Ray Serve: local, auto, or HOST:PORT of a cluster.", REPLICAS),
    ] = None,
    replicas: Annotated[
        int | None, option("N", "Replicas of each bundle (default: 1).", REPLICAS, at_least(1, 10_000))
    ] = None,
    max_replicas: Annotated[
        int | None, option("N", "Replicas under load (default: as --replicas).", REPLICAS, at_least(1, 10_000))
    ] = None,
    gpus_per_replica: Annotated[
        float | None, option("G", "GPUs of each, or a fraction of one; needs a GPU --backend.", REPLICAS, share_of_gpus)
    ] = None,
    log_level: Annotated[LogLevel, option("LEVEL", "debug, info, warning or error.", HOW)] = LogLevel.WARNING,
    quiet: QUIET = False,
    version: VERSION = False,
) -> int:
    """Serve a page on which you type what to look for and see it found, and the same over HTTP as JSON."""
    from glip_deploy.serve.settings import Settings

    for name, value in {
        "--replicas": replicas,
        "--max-replicas": max_replicas,
        "--gpus-per-replica": gpus_per_replica,
    }.items():
        if value is not None and ray is None:
            raise bad_option(name, "needs --ray to have an effect")
    least = replicas or 1
    most = max_replicas or least
    if most < least:
        raise bad_option("--max-replicas", f"{most} is less than the {least} of --replicas")
    on_cpu = backend == "openvino" or PROVIDERS.get(backend) == ("CPUExecutionProvider",)
    settings = Settings(
        host=host,
        port=port,
        token=os.environ.get("GLIP_SERVE_TOKEN") if token is None else token,
        insecure=insecure,
        track=track,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_characters=max_characters,
        max_prompts=max_prompts,
        timeout=timeout,
        queue_size=queue,
        batch_size=batch_size or (1 if on_cpu else 4),
        batch_wait=batch_wait / 1000,
        drain=drain,
    )
    names = [Path(path).resolve().name for path in model]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"two bundles are called {name}; rename the folder of one of them")
    with contextlib.ExitStack() as stack:
        stack.enter_context(log_lines(PROGRAM, "error" if quiet else log_level, "glip_deploy", "uvicorn"))
        uvicorn, listening = _uvicorn(), stack.enter_context(_listening(host, port))

        shown = _source(source, track=track)

        from glip_deploy.batch.cluster import Cluster
        from glip_deploy.bundle.manifest import Bundle
        from glip_deploy.detector import Detector
        from glip_deploy.serve.app import create_app
        from glip_deploy.serve.models import Model
        from glip_deploy.serve.replicas import RayModel, ReplicaSetup, deploy

        models: dict[str, Any] = {}
        opening: dict[str, Any] = {
            "backend": backend,
            "precision": precision,
            "engines": engines,
            "shortest_side": shortest_side,
            "longest_side": longest_side or None,
            "resize": resize,
            "verify": not no_verify,
            "trusted": not untrusted,
            "plugins": not no_plugins,
        }
        queueing: dict[str, Any] = {
            "workers": workers,
            "queue_size": settings.queue_size,
            "batch_size": settings.batch_size,
            "batch_wait": settings.batch_wait,
        }
        if ray is not None:
            stack.enter_context(stderr_for_lines(wanted=log_level is not LogLevel.DEBUG))
            stack.enter_context(contextlib.redirect_stdout(None))  # where Ray prints what its processes report
            each = threads or max(1, (os.cpu_count() or 1) // (most * len(model)))
            cluster = Cluster(ray, each * most * len(model))
            stack.callback(cluster.close)
            cluster.open()
        for name, path in zip(names, model, strict=True):
            if ray is None:
                models[name] = Model(name, Detector.open(path, threads=threads, **opening), **queueing)
            else:
                bundle = Bundle.open(path, verify=not no_verify)
                application = f"glip-{name}-{socket.gethostname()}-{listening.getsockname()[1]}"
                setup = ReplicaSetup(
                    name,
                    application,
                    str(Path(path).absolute()),
                    bundle.manifest_sha256,
                    {"threads": each, **opening},
                    queueing,
                )
                handle = deploy(setup, replicas=least, most=most, threads=each, gpus=gpus_per_replica or 0)
                models[name] = RayModel(
                    name,
                    application,
                    bundle,
                    handle,
                    most=most,
                    shortest_side=shortest_side,
                    longest_side=longest_side or None,
                )
            stack.callback(models[name].close)
        config = uvicorn.Config(
            create_app(settings, models, shown),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.drain)),
            ws_max_size=settings.max_bytes + 2**20,
        )
        if not quiet:
            say(f"{PROGRAM}: http://{_shown(listening)}/ serves {', '.join(names)}; Ctrl-C ends it")
        _run(uvicorn.Server(config), listening)
    return 0


def _run(server: Any, listening: socket.socket) -> None:
    """Run a server until a signal asks for its end; a second one does not wait for requests under way."""

    def end(number: int, frame: object) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    numbers = [
        number
        for name in ("SIGINT", "SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) and signal.getsignal(number) != signal.SIG_IGN  # nohup
    ]
    before = {number: signal.signal(number, end) for number in numbers}
    # uvicorn's own handlers raise the signal again at the end, as if the server had been interrupted in its work.
    server.capture_signals = contextlib.nullcontext
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _uvicorn() -> Any:
    """Return uvicorn, having seen that all packages of the extra are there, before a model is loaded."""
    try:
        import fastapi_offline
        import prometheus_client
        import python_multipart
        import uvicorn
    except ImportError as error:
        raise MissingPackage(f"{error.name} is not installed; pip install 'glip-deploy[serve]'") from None
    del fastapi_offline, prometheus_client, python_multipart
    return uvicorn


def _source(spec: str | None, *, track: bool) -> Any:
    """Return what `--source` names, having seen that it can be read, and followed, before a model is loaded.

    Raises:
        GlipError: it cannot, or a package for it is missing.
    """
    from glip_deploy.serve.sources import SharedSource

    if track:
        from glip_deploy.video.tracking import Tracker

        Tracker()  # its packages are there
    if spec is None:
        return None
    source = SharedSource(spec)
    source.check(track=track)
    return source


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Give a socket that is bound, before anything that takes long.

    Raises:
        OptionError: the port is in use, or the host is none of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"host {host} is not known ({reason}); give 127.0.0.1 or 0.0.0.0") from None
    with socket.socket(family, kind) as bound:
        if sys.platform != "win32":  # there it would let two servers have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            # Connections that come while the model is loaded wait for it.
            bound.listen(128)
        except OSError as error:
            raise OptionError(
                f"port {port} of {host} cannot be used ({error.strerror or error}); choose another with --port"
            ) from None
        yield bound


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
