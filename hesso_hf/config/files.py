"""What files are called that runs write, and of which kinds they read text; no framework is needed to look for them."""

REPORT_NAME = "pruning_report.json"
CARD_NAME = "README.md"
PAGE_NAME = "report.html"
PLOT_NAME = "cric.png"
RECIPE_NAME = "hesso_recipe.yaml"
STATE_NAME = "hesso_state.json"
CONVERSION_NAME = "conversion.json"  # what came of a conversion, in the folder of what was converted
PRUNING_NAME = "hesso_pruning.pt"  # the pruning state, where no optimizer is saved that would hold it
# by which of `datasets`' loaders
TEXT_LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
