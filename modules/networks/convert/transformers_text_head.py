"""Convert classifiers, taggers and question answering on BERT, RoBERTa and DistilBERT to a `TextHead`, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from trunkline import TrunklineError
from trunkline.modules.networks.base import Network
from trunkline.modules.networks.convert.family import ForeignFamily
from trunkline.modules.networks.convert.key_tables import KeyTable, from_theirs, refuse_difference, to_theirs
from trunkline.modules.networks.convert.transformers_bert import BERT_LIKE, BertLike, names_of_today
from trunkline.modules.networks.text_head import TextHead, TextHeadConfig

OUR_HEAD = "a TextHead"
Task = Literal["SequenceClassification", "TokenClassification", "QuestionAnswering"]
"""End of the name of a class of transformers."""
OF_CLASSIFIERS: Mapping[str, KeyTable] = {
    "bert": {"hidden": ("bert.pooler.dense",), "head": ("classifier",)},
    "roberta": {"hidden": ("classifier.dense",), "head": ("classifier.out_proj",)},
    "distilbert": {"hidden": ("pre_classifier",), "head": ("classifier",)},
}
"""`model_type` -> our names of the output layers of a classifier of texts, and theirs."""
DROPOUTS: Mapping[Task, str] = {
    "SequenceClassification": "seq_classif_dropout",
    "TokenClassification": "dropout",
    "QuestionAnswering": "qa_dropout",
}
"""Task of a DistilBERT -> its option for the dropout before the output layer."""


@dataclass(frozen=True)
class TextHeadLike:
    """A task on one of BERT, RoBERTa and DistilBERT."""

    body: BertLike
    task: Task

    @property
    def model(self) -> str:
        """Class of transformers."""
        return self.body.classes[0].removesuffix("Model") + f"For{self.task}"

    @property
    def name(self) -> str:
        """With its article, for messages."""
        return f"a {self.model}"

    @property
    def dropout(self) -> str:
        """Their option for the dropout before the output layer."""
        return DROPOUTS[self.task] if self.body.model_type == "distilbert" else "classifier_dropout"

    def table(self) -> KeyTable:
        """Names of all layers."""
        kind = self.body.model_type
        heads = {"SequenceClassification": OF_CLASSIFIERS[kind], "QuestionAnswering": {"head": ("qa_outputs",)}}
        trunk = {f"body.{ours}": tuple(f"{kind}.{n}" for n in names) for ours, names in self.body.trunk.items()}
        trunk.pop("body.pooler.dense", None)
        return {**trunk, **heads.get(self.task, {"head": ("classifier",)})}

    def weights_from(self, weights: Mapping[str, Tensor], config: TextHeadConfig) -> dict[str, Tensor]:
        """Their state dict -> ours.

        Raises:
            TrunklineError: for a weight that a `TextHead` does not have.
        """
        own = names_of_today(weights)
        table = self.table()
        if not any("pooler" in names[0] for names in table.values()):  # older files keep one that nothing reads
            own = {name: value for name, value in own.items() if ".pooler." not in name}
        return from_theirs(own, table, self.name, OUR_HEAD)

    def weights_to(self, weights: Mapping[str, Tensor], config: TextHeadConfig) -> dict[str, Tensor]:
        """Our state dict -> theirs.

        Raises:
            TrunklineError: for a weight that theirs does not have.
        """
        return to_theirs(weights, self.table(), self.name, OUR_HEAD)

    def config_from(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> TextHeadConfig:
        """Content of their config.json -> our configuration.

        Raises:
            TrunklineError: if theirs uses an option that a `BERT` does not have.
        """
        body = self.body.config_from(config, {})
        given = config.get(self.dropout)
        outputs = len(config.get("id2label") or range(config.get("num_labels", 2)))  # files leave out what is usual
        usual: dict[str, Any] = {"pool": "none"}
        if self.task == "SequenceClassification":
            usual = {"pool": "cls", "hidden": "relu" if self.body.model_type == "distilbert" else "tanh"}
        return TextHeadConfig(
            bert=body, num_outputs=outputs, dropout=body.backbone.dropout if given is None else given, **usual
        )

    def config_to(self, config: TextHeadConfig) -> dict[str, Any]:
        """Our configuration -> content of their config.json.

        Raises:
            TrunklineError: if ours has an option that theirs does not have.
        """
        if config.bert is None:
            raise TrunklineError(f"{OUR_HEAD} on a GPT cannot become {self.name}")
        # Its own output layers, if its configuration has some, were removed.
        bert = replace(config.bert, predicts_tokens=False, next_sentence=False, pooler=False)
        numbers = range(config.num_outputs)
        content = self.body.config_to(bert) | {
            "architectures": [self.model],
            "id2label": {str(number): f"LABEL_{number}" for number in numbers},
            "label2id": {f"LABEL_{number}": number for number in numbers},
            self.dropout: config.dropout,
        }
        del content["tie_word_embeddings"]  # there is no output layer over the vocabulary
        expressed = self.config_from(content, {})
        refuse_difference(config, expressed, self.name, OUR_HEAD, ("bert",))
        return content

    def suits(self, network: Network) -> bool:
        """Whether a network may be of this task: start and end of an answer have no names, but tags have."""
        whole = network.config.pool != "none"
        if whole or self.task == "SequenceClassification":
            return whole and self.task == "SequenceClassification"
        named = network.companions is not None and network.companions.class_names
        return (self.task == "QuestionAnswering") == (network.config.num_outputs == 2 and not named)

    def family(self) -> ForeignFamily:
        """Its entry among the families."""
        return ForeignFamily(
            name=self.name,
            origin="transformers",
            network=TextHead,
            recognises=lambda config: self.model in (config.get("architectures") or ()),
            config_from=self.config_from,
            config_to=self.config_to,
            weights_from=self.weights_from,
            weights_to=self.weights_to,
            suits=self.suits,
            layers=lambda config: (self.table(),),
        )


HEAD_TASKS: tuple[Task, ...] = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
TEXT_HEADS = tuple(TextHeadLike(body, task).family() for body in reversed(BERT_LIKE) for task in HEAD_TASKS)
"""DistilBERT first: it has the fewest options."""
