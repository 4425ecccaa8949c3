"""The two modalities, as every array of this program numbers them."""

VISIBLE = 0
INFRARED = 1
UNKNOWN = -1  # of an image whose modality (or pid, or camid) nothing says
MODALITY_NAMES = {VISIBLE: "visible", INFRARED: "infrared"}
