"""Known data sets of the Hugging Face hub, as they are laid out there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CONVERTED", "PRESETS", "Preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A known data set."""

    path: str
    names: Mapping[str, str]
    """Our language to its configuration."""
    columns: Mapping[str, str]
    """Our field to its column; an empty one says that there is none."""
    further: Mapping[str, str] = field(default_factory=dict)
    """Columns that not every copy has."""
    splits: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    english: Mapping[str, str] | None = None
    """The configuration (name) where the sentence (text) of the same number (key) is the translation."""
    no_speaker: str | None = None
    """What stands for a speaker who is not known."""


CONVERTED = "refs/convert/parquet"  # the hub's own Parquet copy of what is a loading script at main
_FLEURS = (
    "af_za am_et ar_eg as_in az_az be_by bg_bg bn_in bs_ba ca_es cs_cz cy_gb da_dk de_de el_gr en_us es_419 et_ee "
    "fa_ir fi_fi fr_fr gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id is_is it_it ja_jp ka_ge kk_kz km_kh kn_in "
    "ko_kr lb_lu ln_cd lo_la lt_lt lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm ne_np nl_nl oc_fr pa_in pl_pl "
    "ps_af pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua ur_pk "
    "uz_uz vi_vn yo_ng"
).split()
_COVOST = "ar ca cy de es et fa fr id it ja lv mn nl pt ru sl sv-SE ta tr zh-CN".split()
PRESETS = {
    "fleurs": Preset(
        "google/fleurs",
        {name.partition("_")[0]: name for name in _FLEURS}
        | {"jw": "jv_id", "no": "nb_no", "tl": "fil_ph", "yue": "yue_hant_hk", "zh": "cmn_hans_cn"},
        {"audio": "audio", "text": "raw_transcription", "id": ""},  # its `id` is a sentence's, read by several people
        revision=CONVERTED,
        english={"name": "en_us", "key": "id", "text": "raw_transcription"},
    ),
    "covost2": Preset(
        "fixie-ai/covost2",
        {name.partition("-")[0]: f"{name}_en" for name in _COVOST},
        {"audio": "audio", "text": "sentence", "translation": "translation", "id": "id"},
        {"speaker": "client_id"},
    ),
    "mls": Preset(
        "facebook/multilingual_librispeech",
        {
            "de": "german",
            "es": "spanish",
            "fr": "french",
            "it": "italian",
            "nl": "dutch",
            "pl": "polish",
            "pt": "portuguese",
        },
        {"audio": "audio", "text": "transcript", "id": "id"},
        {"speaker": "speaker_id"},
        {"validation": "dev"},
    ),
    "voxpopuli": Preset(
        "facebook/voxpopuli",
        {name: name for name in "cs de en es et fi fr hr hu it lt nl pl ro sk sl".split()},
        {"audio": "audio", "text": "normalized_text", "id": "audio_id"},  # raw_text is empty for many
        {"speaker": "speaker_id"},
        revision=CONVERTED,
        no_speaker="None",
    ),
}
