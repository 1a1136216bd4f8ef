"""One generator moved towards a reward in one of the ways of the survey, very
briefly.
"""

from arcore.zoo.alignment.generative_rl import Options, run

print(run(Options(method="scst", updates=3, pretraining=5, words=100)).text)
