# make demo    set everything up, export a packaged miniature (MODEL=sd3-mini), generate full and pruned images
# make test    set everything up, then lint, types and tests; make test-fast leaves out the tests that take long
# make docs    the documentation as a site, build/site/index.html
# make eval    the fidelity bench on sd3-mini: every method against the full run and fewer steps; an HTML report
# make gpu-check    on a machine with a GPU: its tests, engines and benchmarks, in under ten minutes, into one JSON
PYTHON ?= python3
BIN := .venv/bin
# Made again when a dependency changes and when a file is added to the package or removed from it.
SOURCES := $(shell find src plugins families bundle engines models checkpoints runtime serving exporter tools evaluation tuning -type d -not -name __pycache__)
MODEL ?= sd3-mini
DEMO := build/demo$(if $(filter-out sd3-mini,$(MODEL)),-$(MODEL))
# sd3-mini has no T5, whose empty tokens would be five times its own; and it paints best at this guidance.
EXPORT_sd3-mini := --text-length 48
EXPORT_sd3-mini-256 := --text-length 72
GENERATE_sd3-mini := --guidance-scale 3
GENERATE_pixart-mini := --guidance-scale 4.5
GENERATE_sd3-mini-256 := --guidance-scale 3
PROMPT_sd3-mini-256 := large striped red circle northwest, small plain blue star north, large plain green triangle \
  middle, small dotted orange square southwest, large checked purple cross southeast on a plain navy background
PROMPT := $(or $(PROMPT_$(MODEL)),a large red circle left of a small blue star on a plain black background)

.PHONY: install check test test-fast demo docs eval eval-table eval-quantized eval-quantized-sd3-mini eval-quantized-pixart-mini eval-schedules tune tune-256 truth try-settings bench bench-export bench-macs bench-adapters bench-components bench-quantize bench-forecast bench-startup bench-serve soak soak-serve bench-gpu gpu-check clean peers transfer try-tokens

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cat-pruning needs Python 3.11 or newer, $(PYTHON) is older; run: make PYTHON=/path/to/python3.12 install"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --config-settings editable_mode=strict --editable '.[tensorrt-rtx,dev]'
	@# The tests read Triton's protobuf out of it, and nothing else; it wants older versions of what the others need.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps tritonclient==2.73.0
	@# Beside the others' packages, because diffusers imports it wherever it finds it, which takes two seconds.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --constraint constraints.txt \
	  --target .venv/torchao torchao
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A worker for each core, which computes on one thread. What they share is kept for the next run: tests/fixtures/store.py.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(shell env -u OMP_NUM_THREADS nproc) --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) $(TEST_OPTIONS)

test-fast: install
	$(PYTEST) -m 'not long and not slow'

demo: install
	mkdir -p $(DEMO)
	$(BIN)/cat-export --model $(MODEL) $(EXPORT_$(MODEL)) --out $(DEMO)/$(MODEL) --force
	$(BIN)/cat-generate $(DEMO)/$(MODEL) "$(PROMPT)" -o $(DEMO)/image.png --steps 28 $(GENERATE_$(MODEL)) \
	  --compare --token-map --summary $(DEMO)/summary.json
	mv $(DEMO)/image.comparison.png $(DEMO)/comparison.png
	mv $(DEMO)/image.token_map.png $(DEMO)/token_map.png

# Strict: a broken link, anchor or reference is an error. Nothing is fetched but the packages, once.
docs: .venv/docs-installed
	$(BIN)/python benchmarks/source_tree.py > /dev/null
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --config-settings editable_mode=strict --editable '.[docs]'
	touch $@

# Interrupted, it goes on where it was.
build/eval/sd3-mini: | .venv/installed
	$(BIN)/cat-export --model sd3-mini $(EXPORT_sd3-mini) --target onnx --out $@

EVAL := --prompts scenes:512 --steps 28,50 --keep-ratio 0.3,0.2,0.5

eval: install build/eval/sd3-mini
	$(BIN)/cat-eval build/eval/sd3-mini $(GENERATE_sd3-mini) $(EVAL) --curve-prompts 16 --out build/eval/results
	$(BIN)/python benchmarks/keep_eval.py build/eval/results

# Two hours more: the paper's policy, the full run and fewer steps on every scene at every ratio and schedule.
eval-table: eval
	$(BIN)/cat-eval build/eval/sd3-mini $(GENERATE_sd3-mini) $(EVAL) --methods cat --curve-prompts 512 --out build/eval/results
	$(BIN)/python benchmarks/keep_eval.py build/eval/results

# A quarter of an hour for each, on one core, where no thread waits for others and CPU time is of work: quantized bundles beside their
# miniature's own. The tuned schedules are make tune's.
EVAL_QUANTIZED := eval-quantized-sd3-mini eval-quantized-pixart-mini
eval-quantized: $(EVAL_QUANTIZED)

$(EVAL_QUANTIZED): eval-quantized-%: install build/eval/% build/eval/%-int8 build/eval/%-int8-calibrated build/eval/%-fp8 build/eval/%-weights-int8 build/eval/%-weights-int4
	OMP_NUM_THREADS=1 taskset -c 0 $(BIN)/cat-eval build/eval/$* $(addprefix --quantized ,$(filter build/eval/$*-%,$^)) \
	  $(GENERATE_$*) --prompts scenes:32 --methods cat,forecast,tuned-9 --out build/eval/quantized-$*
	$(BIN)/python benchmarks/keep_eval.py build/eval/quantized-$* --name eval-quantized-$*

build/eval/%-weights-int8: | .venv/installed
	$(BIN)/cat-export --model $* $(EXPORT_$*) --weights-only int8 --out $@

build/eval/%-weights-int4: | .venv/installed
	$(BIN)/cat-export --model $* $(EXPORT_$*) --weights-only int4 --out $@

build/eval/%-int8-calibrated: | .venv/installed
	$(BIN)/cat-export --model $* $(EXPORT_$*) --quantize int8 --calibrate scenes:8 --target onnx --out $@

build/eval/%-fp8: | .venv/installed
	$(BIN)/cat-export --model $* $(EXPORT_$*) --quantize fp8 --calibrate scenes:8 --target onnx --out $@

build/eval/%-int8: | .venv/installed
	$(BIN)/cat-export --model $* $(EXPORT_$*) --quantize int8 --out $@

# Four minutes: shorter schedules, on 32 scenes.
eval-schedules: install build/eval/sd3-mini
	$(BIN)/cat-eval build/eval/sd3-mini $(GENERATE_sd3-mini) --prompts scenes:32 --steps 28,20,12 --curve-prompts 32 \
	  --methods cat,cat+refresh,forecast --out build/eval/schedules
	$(BIN)/python benchmarks/keep_eval.py build/eval/schedules --name eval-schedules

# An hour: schedules fitted and measured, at 28 and 50 steps, for pixart-mini and a FLUX of random weights. Interrupted, it goes on.
TUNE := --prompts scenes:48 --measure scenes:64
tune: install build/eval/sd3-mini build/eval/pixart-mini build/eval/random-flux
	$(BIN)/cat-tune build/eval/sd3-mini $(GENERATE_sd3-mini) $(TUNE) --full 16,12,9,7,6
	$(BIN)/python benchmarks/keep_tune.py build/eval/sd3-mini.tune --name tune-sd3-mini-28
	$(BIN)/cat-tune build/eval/sd3-mini $(GENERATE_sd3-mini) $(TUNE) --steps 50 --full 28,16,12,9,7 --recordings build/eval/sd3-mini.tune-50
	$(BIN)/python benchmarks/keep_tune.py build/eval/sd3-mini.tune-50 --name tune-sd3-mini-50
	$(BIN)/cat-tune build/eval/pixart-mini $(GENERATE_pixart-mini) $(TUNE) --steps 28 --full 16,12,9,7,6
	$(BIN)/python benchmarks/keep_tune.py build/eval/pixart-mini.tune --name tune-pixart-mini-28
	$(BIN)/cat-tune build/eval/random-flux --prompts scenes:24 --measure scenes:64 --steps 28 --full 16,12,9,7,6
	$(BIN)/python benchmarks/keep_tune.py build/eval/random-flux.tune --name tune-random-flux-28

build/eval/pixart-mini: | .venv/installed
	$(BIN)/cat-export --model pixart-mini $(EXPORT_pixart-mini) --target onnx --out $@

build/eval/random-flux: | .venv/installed
	$(BIN)/python benchmarks/random_flux.py build/random-flux
	$(BIN)/cat-export --model build/random-flux --target onnx --text-length 24 --resolution 128x128 --out $@

# On a GPU it takes two minutes.
tune-256: install build/eval/sd3-mini-256
	$(BIN)/cat-tune build/eval/sd3-mini-256 $(GENERATE_sd3-mini-256) --prompts rich:48 --measure rich:24 --full 16,12,9,7,6
	$(BIN)/python benchmarks/keep_tune.py build/eval/sd3-mini-256.tune --name tune-sd3-mini-256-28

# How far from a converged run, the full one included: ten minutes.
truth: install build/eval/sd3-mini
	$(BIN)/cat-eval build/eval/sd3-mini $(GENERATE_sd3-mini) --prompts scenes:16 --curve-prompts 16 --keep-ratio 0.3,0.02 \
	  --methods cat,tuned,forecast,multistep,ab2 --metrics latents,truth,coverage --out build/eval/truth
	$(BIN)/python benchmarks/keep_eval.py build/eval/truth --name eval-truth

# cache-dit is no dependency of ours: pip install --no-deps cache-dit==1.5.3
peers: install
	$(BIN)/python benchmarks/peers.py sd3-mini $(addprefix --schedule ,$(wildcard build/eval/sd3-mini/schedules/28-*.json))
	$(BIN)/python benchmarks/peers.py pixart-mini $(addprefix --schedule ,$(wildcard build/eval/pixart-mini/schedules/28-*.json))

try-settings: install build/eval/sd3-mini
	$(BIN)/python benchmarks/try_settings.py build/eval/sd3-mini
	$(BIN)/python benchmarks/try_unbuilt.py build/eval/sd3-mini
	$(BIN)/python benchmarks/try_partial.py build/eval/sd3-mini

# Do tokens pay where they differ? Every policy, and tokens between full steps, on 1,024 tokens of a textured scene.
try-tokens: install build/eval/sd3-mini-256
	$(BIN)/cat-eval build/eval/sd3-mini-256 $(GENERATE_sd3-mini-256) --prompts rich:32 --curve-prompts 32 --out build/eval/rich-results \
	  --methods cat,random,forecast,noise,stale,cluster,ras,cat+refresh
	$(BIN)/python benchmarks/keep_eval.py build/eval/rich-results --name eval-256
	$(BIN)/python benchmarks/try_partial.py build/eval/sd3-mini-256 --scenes rich --size 256 --batch 4 --prompts 4 --name partial-256

build/eval/sd3-mini-256: | .venv/installed
	$(BIN)/cat-export --model sd3-mini-256 $(EXPORT_sd3-mini-256) --target onnx --out $@

transfer: install build/eval/sd3-mini
	$(BIN)/python benchmarks/transfer.py build/eval/sd3-mini

bench: install
	for family in sd3 pixart flux; do $(BIN)/python benchmarks/bench_step.py --family $$family || exit 1; done

bench-export: install
	$(BIN)/python benchmarks/bench_export.py

bench-macs: install
	$(BIN)/python benchmarks/bench_macs.py

# Text encoders and autoencoder as graphs against torch; the export of T5-XXL wants 20 GB of disk.
bench-components: install build/eval/sd3-mini build/eval/sd3-mini-components
	$(BIN)/python benchmarks/bench_components.py image build/eval/sd3-mini build/eval/sd3-mini-components
	$(BIN)/python benchmarks/bench_components.py parts
	$(BIN)/python benchmarks/bench_components.py export vae
	$(BIN)/python benchmarks/bench_components.py export t5-xxl

# The step in eight and four bits: times, sizes, and the error of random weights; make eval-quantized has images.
bench-quantize: install
	$(BIN)/python benchmarks/bench_quantize.py steps
	$(BIN)/python benchmarks/bench_quantize.py quantizers

build/eval/sd3-mini-components: | .venv/installed
	$(BIN)/cat-export --model sd3-mini $(EXPORT_sd3-mini) --components all --target onnx --out $@

bench-adapters: install build/eval/sd3-mini
	$(BIN)/python benchmarks/bench_adapters.py build/eval/sd3-mini

# What a step costs that computes nothing.
bench-forecast: install
	$(BIN)/python benchmarks/bench_forecast.py

# Whether memory stays flat over 1,000 images of 40 shapes.
soak: install build/eval/sd3-mini
	$(BIN)/python benchmarks/soak_memory.py build/eval/sd3-mini

# Half an hour of mixed load on cat-serve, every picture compared with a direct run.
soak-serve: install build/eval/sd3-mini
	$(BIN)/python benchmarks/soak_serve.py build/eval/sd3-mini

bench-serve: install build/eval/sd3-mini
	$(BIN)/python benchmarks/bench_serve_overhead.py build/eval/sd3-mini --steps 28 --rounds 5 --batch 1 --images 6
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_serve_overhead.py build/eval/sd3-mini --steps 28 --rounds 3 --batch 4 --images 8 --name serve-overhead-4
	$(BIN)/python benchmarks/bench_serve_overhead.py build/eval/sd3-mini --idle
	$(BIN)/python benchmarks/bench_serve_overhead.py build/eval/sd3-mini --rounding
	$(BIN)/python benchmarks/step_batching.py build/eval/sd3-mini

# BEFORE=DIRECTORY measures another checkout beside this one.
bench-startup: install build/eval/sd3-mini
	$(BIN)/python benchmarks/bench_startup.py build/eval/sd3-mini $(if $(BEFORE),--before $(BEFORE))

# On a machine with a GPU, with what is installed there; make install would bring the CPU's torch.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py

bench-gpu:
	PYTHONPATH=$$($(GPU_PYTHON) benchmarks/source_tree.py) $(GPU_PYTHON) benchmarks/bench_gpu.py

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
