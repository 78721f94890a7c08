"""What can only be checked where a user's accelerator is: does it compute right?"""

from jaxrl_post.selftest.report import CHECKS as CHECKS
from jaxrl_post.selftest.report import Report as Report
from jaxrl_post.selftest.report import run as run
