PYTHON ?= python3
VENV ?= .venv
PRESET ?= lab
OUT ?= .study
WORLDS ?= 0
WORKERS ?= 0
SITE ?= .site
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STORED := notebooks/*.ipynb notebooks/exercises/*.ipynb notebooks/exercises/solutions/*.ipynb
EXPERIMENTS := $(sort $(wildcard notebooks/0[2-4]_*.ipynb))

# A Linux machine without an NVIDIA card takes PyTorch's processor build, unless pip is set up for indexes of its own.
TORCH_INDEX ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
	&& ! $(PYTHON) -m pip config list 2>/dev/null | grep -qiE 'index|find-links' && echo https://download.pytorch.org/whl/cpu)
TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Two at a time, since each keeps one core busy; what a platform needs besides comes after it.
LOCKED = xargs -P 2 -n 10 $(BIN)/python -m pip install -q --no-deps

.PHONY: study smoke test test-browser lab slides sweep bench outputs readme replay report clean

study: $(READY)
	@set -e; able=$$($(BIN)/python .ci/experiments.py '$(PRESET)' '$(WORLDS)' '$(OUT)' $(EXPERIMENTS)); \
	$(BIN)/python .ci/compute.py '$(PRESET)' '$(WORLDS)' '$(OUT)' '$(WORKERS)' $$able; \
	for world in $$(echo $(WORLDS) | tr , ' '); do for nb in $$able; do \
	  echo "== $$nb, preset $(PRESET), world $$world, results in $(OUT)/$(PRESET)"; \
	  folder="$(OUT)/$(PRESET)/notebooks"; [ $$world = 0 ] || folder="$(OUT)/$(PRESET)/world-$$world/notebooks"; mkdir -p "$$folder"; \
	  case $$nb in *07_*) which=;; *) which="-p world_seed $$world";; esac; \
	  $(BIN)/papermill $$nb "$$folder/.unfinished-$$$$.ipynb" -p preset $(PRESET) $$which -p results_dir "$(OUT)" \
	    -p workers $(WORKERS) --log-output --log-level WARNING --stdout-file /dev/stdout --no-progress-bar; \
	  mv -f "$$folder/.unfinished-$$$$.ipynb" "$$folder/$$(basename $$nb)"; done; done; \
	case "$(WORLDS) $$able" in *,*04_*) $(BIN)/papermill notebooks/05_report.ipynb "$(OUT)/$(PRESET)/notebooks/05_report.ipynb" \
	  -p preset $(PRESET) -p results_dir "$(OUT)" -y "worlds: [$(WORLDS)]" --no-progress-bar;; esac
	@$(BIN)/python .ci/readme.py "$(OUT)"

smoke:
	@$(MAKE) --no-print-directory study PRESET=smoke

test: $(READY)
	$(LOCKED) < .requirements.test.lock
	$(BIN)/python -m pip install -q -c .requirements.lock -c .requirements.test.lock 'kdlib[cluster,course,eval,lora,serve]'
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: $(READY)
	@$(BIN)/python -c 'import ipywidgets' 2>/dev/null || $(BIN)/python -m pip install -q -c .requirements.lock -e '.[course]'
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

# The same JupyterLab in a real browser: one that CHROMIUM names, else one on the path, else one that Playwright fetches.
test-browser: $(READY)
	$(BIN)/python -m pip install -q -c .requirements.lock -e '.[course,browser]'
	@[ -n "$$CHROMIUM" ] || command -v chromium >/dev/null || command -v google-chrome >/dev/null || $(BIN)/playwright install chromium
	$(BIN)/python -m pytest -o addopts=-q tests/browser

sweep:
	@$(MAKE) --no-print-directory study WORLDS=0 EXPERIMENTS=notebooks/07_learning_rates.ipynb

bench: $(READY)
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python tests/bench/run.py

# Run the notebooks in place and keep their outputs, without what changes from run to run.
outputs: $(READY)
	$(BIN)/python -m pip uninstall -q -y ipywidgets # so that what is stored is the static form
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace $(STORED)
	$(BIN)/nbstripout --keep-output --keep-count --keep-id \
	  --extra-keys "metadata.papermill metadata.widgets metadata.language_info cell.metadata.papermill cell.metadata.execution" $(STORED)

readme: $(READY)
	$(BIN)/python .ci/readme.py

# Recompute everything from the committed records, without training, and compare.
replay: $(READY)
	$(BIN)/python .ci/replay.py

# The notebooks as one small site.
report: $(READY)
	$(BIN)/python .ci/site.py $(SITE)

# The notebooks as slides, without what prepares them.
slides: $(READY)
	$(BIN)/python .ci/site.py .slides slides

clean:
	rm -rf .study .site .slides .browser .venv .pytest_cache build *.egg-info results/smoke results/.cache results/*/variants

$(READY): .requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else f'Python {sys.version.split()[0]} does not do; set PYTHON to a Python 3.11, 3.12 or 3.13.')"
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) $(TORCH) < .requirements.lock
	$(BIN)/python -m pip install -q $(TORCH) -c .requirements.lock -e .
	@touch $@
