"""Print the notebooks, of those given, whose experiments a preset has the data and teachers for: PRESET WORLDS OUT NOTEBOOK …"""

import sys

from kdlib import study

if __name__ == "__main__":
    sys.tracebacklimit = 0
    preset, worlds, out, *notebooks = sys.argv[1:]
    given = worlds.split(",")
    if not all(world.isdigit() for world in given) or len(set(given)) < len(given):
        raise ValueError(f"WORLDS={worlds!r} is not allowed; allowed: different whole numbers with commas between, as in 0,1,2.")
    for world in map(int, given):
        known = study.plan("data_budget", {"preset": preset, "world_seed": world, "results_dir": out}).preset
    names = {notebook: notebook.split("/")[-1].removesuffix(".ipynb")[3:] for notebook in notebooks}
    print(*(notebook for notebook, name in names.items() if name not in study.PARAMETERS or not known.lacks(name)))
