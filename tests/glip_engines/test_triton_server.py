"""The model repository on a real Triton Inference Server, asked by tritonclient over HTTP and gRPC."""

import base64
import io
import json
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from glip_engines.cli import main
from PIL import Image
from serving.local_triton import NotHere, Server, find_triton

from glip_deploy import Detector
from glip_deploy.frames.load import decode_image

pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
pytest.importorskip("tritonclient.grpc", reason="tritonclient's gRPC is not installed")
DATA = Path(__file__).parents[1] / "data" / "nano"
PROMPT = "dog. red apple. bicycle. guitar. penguin. sunflower. bus"
THRESHOLD = 0.3
NAMES = ("BOXES", "SCORES", "LABELS", "PHRASES", "COUNT", "DETECTIONS")


@pytest.fixture(scope="module")
def server(nano_bundle, tmp_path_factory):
    """A server of GLIP-nano."""
    try:
        installation = find_triton()
    except NotHere as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("triton")
    assert main([str(nano_bundle), "--triton", str(folder / "models"), "--batch", "4"]) == 0
    config = folder / "models" / "glip" / "config.pbtxt"
    text = config.read_text().replace(
        '"shortest_side" value { string_value: "800"', '"shortest_side" value { string_value: "224"'
    )
    config.write_text(
        text.replace('"threshold" value { string_value: "0.5"', f'"threshold" value {{ string_value: "{THRESHOLD}"')
    )
    with Server(folder / "models", folder / "log.txt", installation) as running:
        yield running


@pytest.fixture(scope="module")
def detector(nano_bundle):
    with Detector.open(nano_bundle, shortest_side=224, cache_dir=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures():
    return [path.read_bytes() for path in sorted(DATA.glob("trained_0*.jpg"))[:4]]


@pytest.fixture(params=["http", "grpc"])
def ask(server, request):
    """A function that asks the server, over HTTP or gRPC."""
    import tritonclient.grpc
    import tritonclient.http

    library = getattr(tritonclient, request.param)
    address = server.http_address if request.param == "http" else server.grpc_address
    with library.InferenceServerClient(address) as client:

        def asked(images, prompts, thresholds=None, outputs=NAMES):
            count = len(images)
            inputs = [
                library.InferInput("IMAGE", [count, 1], "BYTES"),
                library.InferInput("PROMPT", [count, 1], "BYTES"),
            ]
            inputs[0].set_data_from_numpy(np.array(images, np.object_).reshape(count, 1))
            inputs[1].set_data_from_numpy(np.array([p.encode() for p in prompts], np.object_).reshape(count, 1))
            if thresholds is not None:
                array = np.asarray(thresholds, np.float32)
                inputs.append(library.InferInput("THRESHOLD", list(array.shape), "FP32"))
                inputs[2].set_data_from_numpy(array)
            wanted = [library.InferRequestedOutput(name) for name in outputs]
            answer = client.infer("glip", inputs, outputs=wanted)
            return {name: answer.as_numpy(name) for name in outputs}

        asked.client, asked.failure = client, tritonclient.utils.InferenceServerException
        yield asked


def expected(detector, picture, prompt=PROMPT, threshold=THRESHOLD):
    return detector.detect(decode_image(picture), prompt, threshold, color="rgb")


def assert_row(arrays, row, found):
    count = len(found)
    assert arrays["COUNT"][row, 0] == count
    np.testing.assert_allclose(arrays["BOXES"][row, :count], found.boxes, atol=0.02)
    np.testing.assert_allclose(arrays["SCORES"][row, :count], found.scores, atol=1e-4)
    assert arrays["LABELS"][row, :count].tolist() == found.labels.tolist()
    assert [phrase.decode() for phrase in arrays["PHRASES"][row, :count]] == found.phrases
    assert [one["label"] for one in json.loads(arrays["DETECTIONS"][row, 0])] == found.phrases


def test_a_picture(ask, detector, pictures):
    found = expected(detector, pictures[0])
    assert len(found) > 1
    assert_row(ask(pictures[:1], [PROMPT]), 0, found)


def test_pictures_with_prompts_and_thresholds_of_their_own(ask, detector, pictures):
    prompts = [PROMPT, '["owl", "dog"]', PROMPT]
    arrays = ask(pictures[:3], prompts, [[0.2], [0.3], [0.6]])
    assert_row(arrays, 0, expected(detector, pictures[0], threshold=0.2))
    assert_row(arrays, 1, expected(detector, pictures[1], ["owl", "dog"], 0.3))
    assert_row(arrays, 2, expected(detector, pictures[2], threshold=0.6))


def test_a_picture_with_nothing_in_it(ask):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    arrays = ask([file.getvalue()], [PROMPT], [[0.99]])
    assert arrays["COUNT"].tolist() == [[0]]
    assert arrays["DETECTIONS"].tolist() == [[b"[]"]]
    assert arrays["BOXES"].shape == (1, 0, 4) and arrays["PHRASES"].size == 0


def test_errors_have_the_words_of_the_command_line(ask, detector, pictures):
    for images, prompts, message in (
        ([b"no picture"], [PROMPT], "picture is not in a format Pillow can read; convert it to JPEG or PNG"),
        ([pictures[0], b""], [PROMPT, PROMPT], "picture 2 of 2 is empty (0 bytes)"),
        ([pictures[0]], [" "], "has no words; name what to detect"),
        ([pictures[0]], ["dog. dog"], "dog"),
    ):
        with pytest.raises(ask.failure) as raised:
            ask(images, prompts)
        assert message in raised.value.message() and "Traceback" not in raised.value.message()
    assert_row(ask(pictures[:1], [PROMPT]), 0, expected(detector, pictures[0]))  # the server lives on


def test_requests_that_come_together(server, detector, pictures):
    """Some are bad; every one gets its own answer."""
    import tritonclient.http as library

    answers: dict[int, object] = {}

    def one(place):
        with library.InferenceServerClient(server.http_address) as client:
            image = b"bad" if place % 4 == 3 else pictures[place % 4]
            inputs = [library.InferInput(name, [1, 1], "BYTES") for name in ("IMAGE", "PROMPT")]
            inputs[0].set_data_from_numpy(np.array([[image]], np.object_))
            inputs[1].set_data_from_numpy(np.array([[PROMPT.encode()]], np.object_))
            try:
                answer = client.infer("glip", inputs)
                answers[place] = {name: answer.as_numpy(name) for name in NAMES}
            except Exception as error:
                answers[place] = str(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for place in range(16):
        if place % 4 == 3:
            assert "is not in a format Pillow can read" in answers[place]
        else:
            assert_row(answers[place], 0, expected(detector, pictures[place % 4]))


def test_plain_json_of_the_kserve_protocol(server, detector, pictures):
    def get(path, body=None):
        request = urllib.request.Request(
            f"http://{server.http_address}{path}", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    described = get("/v2/models/glip")
    assert [one["name"] for one in described["inputs"]] == ["IMAGE", "PROMPT", "THRESHOLD"]
    assert [one["datatype"] for one in described["outputs"]] == ["FP32", "FP32", "INT64", "BYTES", "INT32", "BYTES"]
    url = "data:image/jpeg;base64," + base64.b64encode(pictures[0]).decode()
    inputs = [
        {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": [url]},
        {"name": "PROMPT", "shape": [1, 1], "datatype": "BYTES", "data": [PROMPT]},
    ]
    answer = get("/v2/models/glip/infer", json.dumps({"inputs": inputs, "outputs": [{"name": "DETECTIONS"}]}).encode())
    [output] = answer["outputs"]
    assert [one["label"] for one in json.loads(output["data"][0])] == expected(detector, pictures[0]).phrases
