"""The checks of `arcore._kinds` for those who write systems: kinds of arguments, from annotations."""

from arcore._kinds import ARRAY as ARRAY
from arcore._kinds import OPTIONAL_ARRAY as OPTIONAL_ARRAY
from arcore._kinds import Axes as Axes
from arcore._kinds import Bounds as Bounds
from arcore._kinds import Count as Count
from arcore._kinds import Features as Features
from arcore._kinds import Planes as Planes
from arcore._kinds import Positive as Positive
from arcore._kinds import Share as Share
from arcore._kinds import Size as Size
from arcore._kinds import Tokens as Tokens
from arcore._kinds import argument_kinds as argument_kinds
from arcore._kinds import check_kinds as check_kinds
from arcore._kinds import explain_kinds as explain_kinds
