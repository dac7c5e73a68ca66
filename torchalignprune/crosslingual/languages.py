"""Languages: their names, scripts and treebanks, and how much of each XLM-R was pretrained on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CC100_GIB", "LANGUAGES", "Language"]


@dataclass(frozen=True)
class Language:
    """A language, and what the data sets call it.

    Attributes:
        name: in English.
        script: of its text in these data sets, by ISO 15924.
        flores: its code in FLORES-200, and so in SIB-200.
        treebank: the Universal Dependencies treebank that the task ``pos`` reads, if there is one
            with a test split.
        pud: whether its parallel treebank, PUD, is on the hub.
    """

    name: str
    script: str
    flores: str
    treebank: str | None = None
    pud: bool = False


LANGUAGES = {
    "af": Language("Afrikaans", "Latn", "afr_Latn", "af_afribooms"),
    "ar": Language("Arabic", "Arab", "arb_Arab", "ar_padt", pud=True),
    "bg": Language("Bulgarian", "Cyrl", "bul_Cyrl", "bg_btb"),
    "bn": Language("Bengali", "Beng", "ben_Beng"),
    "cs": Language("Czech", "Latn", "ces_Latn", "cs_cac", pud=True),
    "da": Language("Danish", "Latn", "dan_Latn", "da_ddt"),
    "de": Language("German", "Latn", "deu_Latn", "de_gsd", pud=True),
    "el": Language("Greek", "Grek", "ell_Grek", "el_gdt"),
    "en": Language("English", "Latn", "eng_Latn", "en_ewt", pud=True),
    "es": Language("Spanish", "Latn", "spa_Latn", "es_gsd", pud=True),
    "et": Language("Estonian", "Latn", "est_Latn", "et_edt"),
    "eu": Language("Basque", "Latn", "eus_Latn", "eu_bdt"),
    "fa": Language("Persian", "Arab", "pes_Arab", "fa_seraji"),
    "fi": Language("Finnish", "Latn", "fin_Latn", "fi_tdt", pud=True),
    "fr": Language("French", "Latn", "fra_Latn", "fr_gsd", pud=True),
    "he": Language("Hebrew", "Hebr", "heb_Hebr", "he_htb"),
    "hi": Language("Hindi", "Deva", "hin_Deva", "hi_hdtb", pud=True),
    "hu": Language("Hungarian", "Latn", "hun_Latn", "hu_szeged"),
    "id": Language("Indonesian", "Latn", "ind_Latn", "id_gsd", pud=True),
    "is": Language("Icelandic", "Latn", "isl_Latn", None, pud=True),
    "it": Language("Italian", "Latn", "ita_Latn", "it_isdt", pud=True),
    "ja": Language("Japanese", "Jpan", "jpn_Jpan", "ja_gsd", pud=True),
    "ka": Language("Georgian", "Geor", "kat_Geor"),
    "kk": Language("Kazakh", "Cyrl", "kaz_Cyrl", "kk_ktb"),
    "ko": Language("Korean", "Hang", "kor_Hang", "ko_gsd", pud=True),
    "lt": Language("Lithuanian", "Latn", "lit_Latn", "lt_alksnis"),
    "ml": Language("Malayalam", "Mlym", "mal_Mlym"),
    "mr": Language("Marathi", "Deva", "mar_Deva", "mr_ufal"),
    "my": Language("Burmese", "Mymr", "mya_Mymr"),
    "nl": Language("Dutch", "Latn", "nld_Latn", "nl_alpino"),
    "pl": Language("Polish", "Latn", "pol_Latn", "pl_pdb", pud=True),
    "pt": Language("Portuguese", "Latn", "por_Latn", "pt_gsd", pud=True),
    "ro": Language("Romanian", "Latn", "ron_Latn", "ro_rrt"),
    "ru": Language("Russian", "Cyrl", "rus_Cyrl", "ru_gsd", pud=True),
    "sv": Language("Swedish", "Latn", "swe_Latn", "sv_talbanken", pud=True),
    "sw": Language("Swahili", "Latn", "swh_Latn"),
    "ta": Language("Tamil", "Taml", "tam_Taml", "ta_ttb"),
    "te": Language("Telugu", "Telu", "tel_Telu", "te_mtg"),
    "th": Language("Thai", "Thai", "tha_Thai", "th_tud", pud=True),
    "tr": Language("Turkish", "Latn", "tur_Latn", "tr_imst", pud=True),
    "uk": Language("Ukrainian", "Cyrl", "ukr_Cyrl", "uk_iu"),
    "ur": Language("Urdu", "Arab", "urd_Arab", "ur_udtb"),
    "vi": Language("Vietnamese", "Latn", "vie_Latn", "vi_vtb"),
    "zh": Language("Chinese (simplified)", "Hans", "zho_Hans", "zh_gsdsimp"),
    "zh-hant": Language("Chinese (traditional)", "Hant", "zho_Hant", "zh_gsd", pud=True),
}

# GiB of text of XLM-R's pretraining corpus, CC-100: Conneau et al. 2020, "Unsupervised
# Cross-lingual Representation Learning at Scale", table 6.
CC100_GIB = {
    "af": 1.3, "ar": 28.0, "bg": 57.5, "bn": 8.4, "cs": 16.3, "da": 45.6, "de": 66.6, "el": 46.9,
    "en": 300.8, "es": 53.3, "et": 6.1, "eu": 2.0, "fa": 111.6, "fi": 54.3, "fr": 56.8, "he": 31.6,
    "hi": 20.2, "hu": 58.4, "id": 148.3, "is": 3.2, "it": 30.2, "ja": 69.3, "ka": 9.1, "kk": 6.4,
    "ko": 54.2, "lt": 13.7, "ml": 7.6, "mr": 2.8, "my": 1.6, "nl": 29.3, "pl": 44.6, "pt": 49.1,
    "ro": 61.4, "ru": 278.0, "sv": 85.0, "sw": 1.6, "ta": 12.2, "te": 4.7, "th": 71.7, "tr": 20.9,
    "uk": 84.6, "ur": 5.7, "vi": 137.3, "zh": 46.9, "zh-hant": 16.6,
}  # fmt: skip
