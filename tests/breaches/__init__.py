"""The breaches of privacy that tests.mutations plants: text of the source, what takes its place, and who notices.

Every one is a member of a kind of breach; the tests are meant to notice the kind.
"""

from tests.breaches import accounting, empirical, program
from tests.breaches.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (*accounting.MUTATIONS, *program.MUTATIONS, *empirical.MUTATIONS)
