"""Settings of the plugin: opt-in flags with environment names, `patch()` and a validated snapshot.

Values are read from three places, the later winning: environment variables, assignments or `patch()` on this
module, and `options={"fusion_passes.<name>": value}` of a single `torch.compile` call. The pass never reads
this module while it runs: it carries a `Settings` snapshot, because values set here belong to one thread.

    import fusion_passes
    fusion_passes.config.strict = True
    with fusion_passes.config.patch(fusions="default,-gate_cumsum"):
        ...
"""

import contextlib
import sys
import typing

from torch.utils._config_module import Config, install_config_module

# None: the doors decide. True: plain Inductor compiles are rewritten too, from `import fusion_passes` on.
# False: nothing is rewritten, whatever door is used.
enabled: bool | None = Config(default=None, env_name_default="FUSION_PASSES")

# Comma-separated names: "default", "all", "none", a fusion's name, or "-name" to leave one out.
fusions: str = Config(default="default", env_name_default="FUSION_PASSES_FUSIONS")

# Raise instead of leaving the graph alone when the plugin itself fails.
strict: bool = Config(default=False, env_name_default="FUSION_PASSES_STRICT")

# Run the matched subgraph and the fused op on random inputs of the real shapes before every rewrite.
verify: bool = Config(default=False, env_name_default="FUSION_PASSES_VERIFY")

# Rewrite CPU graphs as well; each op then runs its plain PyTorch reference.
reference_on_cpu: bool = Config(default=False, env_name_default="FUSION_PASSES_REFERENCE_ON_CPU")

# Ignore the profit rule: fuse wherever it is legal.
always_profitable: bool = Config(default=False, env_name_default="FUSION_PASSES_ALWAYS_PROFITABLE")

# The GPU assumed where the graph's device is not a GPU of this machine: "sm_80", "sm_89", "sm_90", "sm_100", "gfx942".
arch: str = Config(default="sm_90", env_name_default="FUSION_PASSES_ARCH")

# How often each fusion must be found in a compiled graph, such as "gate_cumsum=24,other=2" or the same as a dictionary;
# the compile fails otherwise.
expect: str = Config(default="", env_name_default="FUSION_PASSES_EXPECT")

# Launch parameters in place of the tuned tables, such as "gate_cumsum: rows=4, lanes=128, warps=1".
launch: str = Config(default="", env_name_default="FUSION_PASSES_LAUNCH")

if typing.TYPE_CHECKING:

    def patch(**settings: typing.Any) -> contextlib.AbstractContextManager[None]:
        """Set some of the settings for the code inside a `with` block."""


install_config_module(sys.modules[__name__])
