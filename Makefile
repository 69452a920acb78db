# Two commands: `make demo` and `make test`. Both set everything up on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo demo-full test test-slow coverage engines graph-report cpp fuzz faults soak cpp-soak load lint docs clean

# Demo and tests start hundreds of processes. Where Python may not keep what it compiles, each would compile all that it
# imports again.
export PYTHONDONTWRITEBYTECODE :=

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# torch is pinned first: an unpinned torch takes the newest CUDA build, several gigabytes. uv installs the rest in a
# fraction of pip's time; where there is none, or where it cannot reach what pip is configured for, pip does.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	($(PIP) --only-binary :all: uv && $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]') || $(PIP) -e '.[dev]'
	touch $@

DEMO  := build/demo
PHOTO := export/glip_export/data/picture.jpg

demo: $(VENV)/.ready
	@mkdir -p $(DEMO)
	@echo "== 1. glip-export: GLIP-nano, a small GLIP trained by examples/nano, to ONNX graphs verified against torch"
	$(BIN)/glip-export --model examples/nano/glip_nano.pth --output $(DEMO)/glip_nano --overwrite
	@echo "== 2. A picture, then a 10-second video whose prompt changes halfway"
	$(BIN)/python examples/nano/demo.py $(DEMO)/glip_nano $(DEMO)
	@echo
	@echo "Look at $(DEMO)/nano_scene.png and $(DEMO)/nano_moving.mp4."
	@echo "The same at GLIP-T's full size, with stand-in weights (real timings, arbitrary boxes): make demo-full"
	@echo "With a released checkpoint: glip-export --model glip_tiny_model_o365_goldg.pth --output glip_t/"
	@echo
	@echo "Type what to look for in your browser, while the video runs, or in your own camera:"
	@echo "    $(BIN)/glip-serve --model $(DEMO)/glip_nano --shortest-side 224 --source examples/nano/media/moving.mp4"

demo-full: $(VENV)/.ready
	@mkdir -p $(DEMO)
	@echo "== 1. A full-size GLIP-T checkpoint in the official format, with stand-in weights"
	@test -f $(DEMO)/glip_t.pth || $(BIN)/python examples/stand_in/make_checkpoint.py T $(DEMO)/glip_t.pth
	@echo "== 2. glip-export: ONNX graphs, verified against torch"
	$(BIN)/glip-export --model $(DEMO)/glip_t.pth --output $(DEMO)/glip_t --overwrite
	@echo "== 3. A photograph at the evaluation size (800 x 1199)"
	$(BIN)/glip-detect --model $(DEMO)/glip_t --prompt "person. red roof. stone lion" --source $(PHOTO) \
	    --threshold 0.85 --output $(DEMO)/photograph.jpg --json $(DEMO)/photograph.jsonl
	@echo "== 4. A short video, the same prompt (its text branch does not run again)"
	$(BIN)/python examples/pan_video.py $(PHOTO) $(DEMO)/pan.mp4 --frames 12
	$(BIN)/glip-detect --model $(DEMO)/glip_t --prompt "person. red roof. stone lion" --source $(DEMO)/pan.mp4 \
	    --shortest-side 320 --threshold 0.85 --output $(DEMO)/pan_annotated.mp4 --json $(DEMO)/pan.jsonl
	@echo
	@echo "Look at $(DEMO)/photograph.jpg and $(DEMO)/pan_annotated.mp4."
	@echo "THE BOXES ARE ARBITRARY: released weights cannot travel with this repository, so the checkpoint above"
	@echo "has synthetic ones. The arithmetic and the timings are real."

# More than the processors of a small machine, since tests also wait: for servers, clusters and downloads.
TEST_WORKERS ?= 3
# A file at a time to each process, in the order in which tests/conftest.py has them.
PARALLEL := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL)

# With the tests that are left out for their time.
test-slow: $(VENV)/.ready
	GLIP_SLOW=1 $(BIN)/python -m pytest $(PARALLEL)

# The same tests, slower, with a table of the lines that they do not run; the report is in build/coverage.
coverage: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

# Needs no GPU: GLIP-T's engines for five GPU generations in both forms, with their times and sizes, then the slow tests.
engines: $(VENV)/.ready
	@mkdir -p $(DEMO)
	@test -f $(DEMO)/glip_t.pth || $(BIN)/python examples/stand_in/make_checkpoint.py T $(DEMO)/glip_t.pth
	@test -f $(DEMO)/glip_t/manifest.json || $(BIN)/glip-export --model $(DEMO)/glip_t.pth --output $(DEMO)/glip_t
	$(BIN)/python benchmarks/kernels/build_matrix.py $(DEMO)/glip_t --others --limit 900 --output build/engines.json
	GLIP_SLOW=1 $(BIN)/python -m pytest tests/glip_engines

# Damaged and hostile inputs of every kind, half a minute each, from a seed: make fuzz SEED=7 SECONDS=60
SEED    ?= 0
SECONDS ?= 30
fuzz: $(VENV)/.ready
	$(BIN)/python tests/fuzz/campaign.py --replay
	$(BIN)/python tests/fuzz/campaign.py --seed $(SEED) --seconds $(SECONDS)

# Kills, full disks, closed streams and signals at random moments: the short selection of `make test`, and the long one.
faults: $(VENV)/.ready
	GLIP_SLOW=1 $(BIN)/python -m pytest tests/faults

# 20,000 frames of GLIP-nano with changing prompts, sizes, clones and backends: does anything grow?
soak: $(VENV)/.ready
	@test -f $(DEMO)/glip_nano/manifest.json || $(BIN)/glip-export --model examples/nano/glip_nano.pth --output $(DEMO)/glip_nano
	$(BIN)/python benchmarks/robustness/soak.py $(DEMO)/glip_nano --json build/soak.json

# 10,000 frames through the C++ runtime, with changing prompts, sizes, batches and clones: does anything grow?
cpp-soak: $(VENV)/.ready
	@test -f $(DEMO)/glip_nano/manifest.json || $(BIN)/glip-export --model examples/nano/glip_nano.pth --output $(DEMO)/glip_nano
	cmake -S engines/runtime -B build/runtime -DGLIP_TESTS=ON \
	    -DOpenVINO_DIR=$$($(BIN)/python -c "from openvino.utils import get_cmake_path; print(get_cmake_path())")
	cmake --build build/runtime --parallel --target glip_soak glip_openvino
	$(BIN)/python benchmarks/robustness/soak_cpp.py $(DEMO)/glip_nano --json build/soak-cpp.json

# 64 clients ask a glip-serve of this machine for two minutes; batches of several sizes; a request against one process.
load: $(VENV)/.ready
	@test -f $(DEMO)/glip_nano/manifest.json || $(BIN)/glip-export --model examples/nano/glip_nano.pth --output $(DEMO)/glip_nano
	$(BIN)/python benchmarks/serving/load.py $(DEMO)/glip_nano --json build/load.json

# The C++ runtime and its tests. Debian packages: cmake g++ libutf8proc-dev nlohmann-json3-dev; OpenVINO comes from its wheel.
cpp: $(VENV)/.ready
	cmake -S engines/runtime -B build/runtime -DGLIP_TESTS=ON \
	    -DOpenVINO_DIR=$$($(BIN)/python -c "from openvino.utils import get_cmake_path; print(get_cmake_path())")
	cmake --build build/runtime --parallel
	$(BIN)/python -m pytest tests/runtime

# Needs no GPU: nodes, layers, launches and bytes of GLIP-T's rewritten image graph, in both forms.
graph-report: $(VENV)/.ready
	@mkdir -p $(DEMO)
	@test -f $(DEMO)/glip_t.pth || $(BIN)/python examples/stand_in/make_checkpoint.py T $(DEMO)/glip_t.pth
	@test -f $(DEMO)/glip_t/manifest.json || $(BIN)/glip-export --model $(DEMO)/glip_t.pth --output $(DEMO)/glip_t
	$(BIN)/python benchmarks/kernels/graph_report.py $(DEMO)/glip_t --output build/graph.json
	$(BIN)/python benchmarks/kernels/graph_report.py $(DEMO)/glip_t --tokens 256 --classes 80 --output build/graph.json

STUBS := build/stubs

# Only TensorRT's types: mypy then checks every use of its API without TensorRT.
$(STUBS)/.ready: engines/tensorrt_stubs.py $(VENV)/.ready
	$(BIN)/python engines/tensorrt_stubs.py $(STUBS)
	touch $@

lint: $(VENV)/.ready $(STUBS)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site: every warning is an error, and nothing is fetched.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist
