# The doctor imports the agent under the name that it has on a host.
from corra.agent import *
