// The names that users write for methods, normalisations, baselines and blends. Both bindings read them from
// here.
#pragma once

#include <string.h>

#include "diffcam/cam.h"
#include "diffcam/logit_difference.h"
#include "diffcam/overlay.h"

namespace diffcam {

// Index of name among names, or -1.
template <int count>
int index_of(const char* name, const char* const (&names)[count]) {
    for (int i = 0; i < count; ++i) {
        if (strcmp(name, names[i]) == 0) return i;
    }
    return -1;
}

inline bool parse_method(const char* name, CamMethod* method) {
    static const char* const names[] = {"gradcam",  "gradcam++", "xgradcam",
                                        "hirescam", "layercam",  "elementwise"};
    const int index = index_of(name, names);
    *method = static_cast<CamMethod>(index);
    return index >= 0;
}

inline bool parse_normalization(const char* name, Normalization* normalization) {
    static const char* const names[] = {"none", "max", "minmax"};
    const int index = index_of(name, names);
    *normalization = static_cast<Normalization>(index);
    return index >= 0;
}

inline bool parse_baseline(const char* name, Baseline* baseline) {
    static const char* const names[] = {"max", "mean", "logsumexp", "expected", "finer"};
    const int index = index_of(name, names);
    *baseline = static_cast<Baseline>(index);
    return index >= 0;
}

inline bool parse_blend(const char* name, Blend* blend) {
    static const char* const names[] = {"proportional", "uniform"};
    const int index = index_of(name, names);
    *blend = static_cast<Blend>(index);
    return index >= 0;
}

}  // namespace diffcam
