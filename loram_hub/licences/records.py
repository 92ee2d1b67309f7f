"""The licences that are known here."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

CHANGES = "Changes to the base model:"
"""How the statement begins that a card and a Notice file make where a licence asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """A licence of base models and what it asks for."""

    id: str
    """The Hub's identifier (`llama3.1`); where the Hub has none, what goes into `license_name` (`qwen-research`)."""
    title: str
    """Name that people know."""
    on_hub: bool = True
    """Whether the Hub lists the identifier; if not, the metadata says `other` and names the licence."""
    models: str = r"(?!)"
    """Regular expression over the Hub ids that its owner publishes under it."""
    text_holds: str | None = None
    """Words by which the licence's text is known."""
    link: str | None = None
    """Where the terms are on the web."""
    name_prefix: str | None = None
    """What the name of a derivative must begin with."""
    notice: str | None = None
    """Sentence that must stand in a text file called Notice."""
    display: tuple[str, ...] = ()
    """Lines of which the card must show one; the first is the one that our cards show."""
    use_policy: str | None = None
    """Address of the use policy that comes with it."""
    has_policy_file: bool = False
    """Whether the base ships the policy as USE_POLICY, so that a copy travels along."""
    states_changes: bool = False
    """Whether it asks for a statement that files were changed."""
    limits: tuple[str, ...] = ()
    """What users of a derivative must know, for the card."""

    @property
    def metadata(self) -> dict[str, str]:
        """The card's metadata: `license`, and name and link where the Hub has no identifier."""
        if self.on_hub:
            return {"license": self.id}
        return {"license": "other", "license_name": self.id, "license_link": "LICENSE"}

    @property
    def binds(self) -> bool:
        """Whether more is asked than a copy of the text and a word on changes."""
        return bool(self.name_prefix or self.notice or self.display or self.use_policy)


_NOT_FOR_OTHER_MODELS = "Neither it nor its output may be used to improve other large language models"
_META_USERS = "More than 700 million monthly active users need a licence from Meta"
_ALIBABA_USERS = "Commercial use with more than 100 million monthly active users needs a licence from Alibaba Cloud"


def _llama(version: str) -> Licence:
    """Llama 3.1 and later share their conditions."""
    site = f"https://www.llama.com/llama{version.replace('.', '_')}"
    return Licence(
        id=f"llama{version}",
        title=f"Llama {version} Community License",
        models=rf"meta-llama/(Meta-)?Llama-{re.escape(version)}-.+",
        text_holds=f"Llama {version} Community License Agreement",
        link=f"{site}/license/",
        name_prefix="Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        display=("Built with Llama",),
        use_policy=f"{site}/use-policy",
        has_policy_file=True,
        limits=(
            f"{_META_USERS}.",
            "A model trained with it or with its output must have a name that begins with Llama.",
        ),
    )


LICENCES: tuple[Licence, ...] = (
    Licence(
        id="llama2",
        title="Llama 2 Community License",
        models=r"meta-llama/(Llama-2|CodeLlama)-.+",
        text_holds="Llama 2 Community License Agreement",
        link="https://ai.meta.com/llama/license/",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        use_policy="https://ai.meta.com/llama/use-policy/",
        has_policy_file=True,
        limits=(f"{_META_USERS}.", f"{_NOT_FOR_OTHER_MODELS} than Llama 2 and its derivatives."),
    ),
    replace(
        _llama("3"),
        title="Meta Llama 3 Community License",
        name_prefix="Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        display=("Built with Meta Llama 3",),
        limits=(f"{_META_USERS}.", f"{_NOT_FOR_OTHER_MODELS} than Llama 3 and its derivatives."),
    ),
    _llama("3.1"),
    _llama("3.2"),
    _llama("3.3"),
    replace(_llama("4"), on_hub=False),  # Meta's own cards say `other` with this name
    Licence(
        id="gemma",
        title="Gemma Terms of Use",
        models=r"google/gemma-(?!4-).+",  # Gemma 4 is Apache-2.0
        text_holds="Gemma Terms of Use",
        link="https://ai.google.dev/gemma/terms",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        use_policy="https://ai.google.dev/gemma/prohibited_use_policy",
        states_changes=True,
        limits=(
            "Its use restrictions (section 3.2 of the terms, and the prohibited use policy) bind everyone who receives "
            "it, and must be passed on in any agreement on its use or distribution.",
        ),
    ),
    Licence(
        id="qwen",
        title="Qwen License Agreement",
        on_hub=False,
        models=r"Qwen/Qwen2\.5-(Math-)?72B.*",
        text_holds="Qwen License Agreement",
        notice="Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
        display=("Built with Qwen", "Improved using Qwen"),
        states_changes=True,
        limits=(f"{_ALIBABA_USERS}.",),
    ),
    Licence(
        id="qwen-research",
        title="Qwen Research License Agreement",
        on_hub=False,
        models=r"Qwen/Qwen2\.5-(Coder-)?3B.*",
        text_holds="Qwen Research License Agreement",
        notice="Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, "
        "Copyright (c) Alibaba Cloud. All Rights Reserved.",
        display=("Built with Qwen", "Improved using Qwen"),
        states_changes=True,
        limits=("For research and evaluation only: commercial use needs a licence from Alibaba Cloud.",),
    ),
    Licence(
        id="tongyi-qianwen",
        title="Tongyi Qianwen License Agreement",
        on_hub=False,
        models=r"Qwen/(Qwen2-(Math-)?72B.*|Qwen1\.5-(4|7|14|32|72|110)B.*)",
        text_holds="Tongyi Qianwen License Agreement",
        notice="Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, "
        "Copyright (c) Alibaba Cloud. All Rights Reserved.",
        states_changes=True,
        limits=(f"{_ALIBABA_USERS}.", f"{_NOT_FOR_OTHER_MODELS} than Tongyi Qianwen and its derivatives."),
    ),
    Licence(
        id="apache-2.0",
        title="Apache License 2.0",
        models=(
            r"Qwen/(Qwen2-(0\.5|1\.5|7)B|Qwen2\.5-(Coder-|Math-)?(0\.5|1\.5|7|14|32)B|Qwen3-).*"
            r"|mistralai/Mistral-(7B|Nemo|Small-24B|Small-3\.).*"
            r"|HuggingFaceTB/SmolLM[23]?-.+|allenai/OLMo-2-.+|google/gemma-4-.+"
        ),
        text_holds="Apache License",
        link="https://www.apache.org/licenses/LICENSE-2.0",
        states_changes=True,
    ),
    Licence(
        id="mit",
        title="MIT License",
        models=r"microsoft/(Phi-3(\.5)?-.+|phi-4.*)",
        text_holds="Permission is hereby granted, free of charge",
        link="https://opensource.org/license/mit",
    ),
)
"""Licences whose conditions are known here."""

# The Hub's list (hub-docs, repositories-licenses.md); any other licence goes into `license_name`.
HUB_IDS = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
    "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "gemma",
})  # fmt: skip
