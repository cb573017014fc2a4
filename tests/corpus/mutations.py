"""All mutations of the corpus."""

from tests.corpus.attacks import ATTACKS
from tests.corpus.harmless import HARMLESS
from tests.corpus.mutation import Mutation
from tests.corpus.real import REAL
from tests.corpus.surroundings import SURROUNDINGS

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = (*HARMLESS, *REAL, *ATTACKS, *SURROUNDINGS)
