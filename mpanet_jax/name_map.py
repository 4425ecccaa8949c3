"""What a network's arrays are called in PyTorch: rules on the paths of a Flax tree.

An array's path is joined by "/". Rules turn the path into PyTorch's name, one after the other. A backbone's rules are
in its file, a method's in the method's.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Rules = Sequence[tuple[str, str]]

# Where Flax and PyTorch differ in every network.
COMMON_RULES = (
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
)


@dataclass(frozen=True)
class NameMap:
    """The names in PyTorch of a network's arrays.

    Attributes:
      rules: pairs (pattern, replacement), applied to a path in order; the path of an average begins with `averages/`.
      backbone_rules: the same for a bare backbone, as ImageNet's weights are. If several paths get one name, that array
        initialises all of them.
      backbone: pattern of the paths that belong to the backbone.
      linear: pattern of the *names* of linear layers, which are the classifiers; in PyTorch all other matrices are 1×1
        convolutions.
      zeros: names that only PyTorch has, of arrays that must be 0; each is beside a `….weight`.
      left_out: pattern of names that are not used here, such as those of ImageNet's classifier.
      describe: describes the backbone that a state dict's names belong to; '' for none (`Backbone.describe`).
    """

    rules: Rules = ()
    backbone_rules: Rules = ()
    backbone: str = r"(stem|stage\d)/"
    linear: str = r"(.*\.)?\w*classifier\w*\.(weight|bias)"
    zeros: Sequence[str] = ()
    left_out: str = r"(.*\.)?fc\.\w+"
    describe: Callable[[Iterable[str]], str] = lambda names: ""

    def name(self, path: Sequence[str]) -> str:
        """PyTorch's name of the array at `path`, whose first part is the collection, such as 'params'."""
        name = "/".join(path if path[0] == "averages" else path[1:])
        for pattern, replacement in (*self.rules, *COMMON_RULES):
            name = re.sub(pattern, replacement, name)
        return name.replace("/", ".")

    def is_backbone(self, path: Sequence[str]) -> bool:
        """Whether the array belongs to the backbone."""
        return path[0] != "averages" and re.match(self.backbone, "/".join(path[1:])) is not None

    def is_classifier(self, name: str) -> bool:
        """Whether `name`, in PyTorch, is a classifier's."""
        return re.fullmatch(self.linear, name) is not None
