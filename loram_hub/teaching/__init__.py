"""The base's most probable next tokens for every position of the training stream, computed once and stored.

Distillation then needs no base in memory. `settings` says what is asked for, `outputs` streams the base, `shards` reads
and writes the stored targets, `records` describes a folder of them, `processes` are those that share the work,
`teaching` puts it together.
"""

from loram_hub.teaching.settings import TeachingEstimate as TeachingEstimate
from loram_hub.teaching.settings import TeachingSettings as TeachingSettings
from loram_hub.teaching.settings import teacher_bytes as teacher_bytes
from loram_hub.teaching.shards import TeacherShards as TeacherShards
from loram_hub.teaching.teaching import check_teach as check_teach
from loram_hub.teaching.teaching import teach as teach
