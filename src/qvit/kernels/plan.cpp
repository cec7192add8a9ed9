#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "sizes.h"

namespace qvit {

namespace {

void widen(size_t& largest, size_t value) { largest = std::max(largest, value); }

void grow(size_t& sum, size_t count, size_t size) { sum = sum_of(sum, product_of(count, size)); }

void fold(Mlp& mlp, bool post) {
    if (!post && mlp.norm.present && mlp.kind != Mlp::Kind::swiglu) mlp.norm.fold({mlp.fc1.input});
    if (mlp.inner.present) mlp.inner.fold({mlp.fc2.input});
    mlp.steps = steps_of(mlp.activation, mlp.fc2.input);
}

}  // namespace

Plan::Plan(const Isa& isa_, size_t channels_, size_t height_, size_t width_)
    : isa(isa_), channels(channels_), height(height_), width(width_), largest_task(kBlockRows) {}

void Plan::embed(size_t patch_height, size_t patch_width, const LinearSpec& layer) {
    const size_t rows = height / patch_height, columns = width / patch_width;
    const size_t inputs = product_of(channels, patch_height, patch_width);
    stages.push_back({rows * columns, layer.outputs, round_up(layer.outputs, kChannels), rows, columns, 0});
    embedding.patch_height = patch_height;
    embedding.patch_width = patch_width;
    embedding.layer = Linear(isa, layer, stage().parts(), {1, inputs});
    embedding.place = place();
    consider(embedding.layer);
    add(Step::Kind::embed, 0);
    ++operations;
}

void Plan::tokens(const float* prefix, size_t count, const float* positions) {
    if (phases.size() != 1 || phases[0].steps.size() != 1)
        raise<std::invalid_argument>("it has tokens that come after more than the patches and their norm");
    Stage& stage = stages.back();
    const size_t patches = stage.tokens;
    stage.prefix = count;
    stage.tokens = sum_of(patches, count);
    embedding.prefix = Buffer<float>(product_of(count, stage.width));
    for (size_t i = 0; i < count; ++i)
        std::copy_n(prefix + i * stage.channels, stage.channels,
                    embedding.prefix.rows(count, stage.width).row(i, stage.channels));
    if (positions != nullptr) {
        embedding.positions = Buffer<float>(product_of(patches, stage.width));
        for (size_t i = 0; i < patches; ++i)
            std::copy_n(positions + i * stage.channels, stage.channels,
                        embedding.positions.rows(patches, stage.width).row(i, stage.channels));
    }
    ++operations;
}

void Plan::norm(Norm norm) {
    ++operations;
    if (pooled) {
        pooling.after.push_back(std::move(norm));
    } else if (phases.back().steps.back().kind == Step::Kind::embed && !embedding.norm.present && stage().prefix == 0 &&
               embedding.positions.empty()) {
        embedding.norm = std::move(norm);  // of the patches, before their positions
    } else {
        norms.push_back(std::move(norm));
        add(Step::Kind::norm, norms.size() - 1);
    }
}

void Plan::residual(std::vector<Attention> attending, std::vector<Mlp> feeding, bool post,
                    const std::array<size_t, 4>& window) {
    // All branches start from the stream as it is now. Queries, keys and values are codes of their own from then on, so
    // the MLPs may add to the stream before the attentions do.
    ++operations;
    const bool attends = !attending.empty();
    if (attends) {
        Attentions group{post, std::move(attending), 0, 0};
        if (window[0] != 0) group.windows = windows_of(window[0], window[1], window[2], window[3]);
        const size_t tokens = group.windows == 0 ? stage().tokens : windows[group.windows - 1].tokens;
        for (Attention& attention : group.branches) {
            attention.group = tokens;
            attention.padded_group = round_up(tokens, kChannels);
            if (!post && attention.norm.present) attention.norm.fold({attention.qkv.input});
            attention.finish(isa);
        }
        consider(group);
        attentions.push_back(std::move(group));
        add(Step::Kind::project, attentions.size() - 1);
    }
    if (!feeding.empty()) {
        for (Mlp& mlp : feeding) {
            consider(mlp.fc1);
            consider(mlp.fc2);
            widen(largest_row, mlp.kind == Mlp::Kind::plain ? mlp.hidden : product_of(2, mlp.hidden));
            fold(mlp, post);
        }
        mlps.push_back({post, std::move(feeding)});
        add(Step::Kind::feed_forward, mlps.size() - 1);
    }
    if (attends) add(Step::Kind::attend, attentions.size() - 1);
}

void Plan::merge(Norm norm, const LinearSpec& layer) {
    const Stage from = stage();
    merges.push_back({place(), std::move(norm), {}, stages.size() - 1});
    stages.push_back(
        {from.tokens / 4, layer.outputs, round_up(layer.outputs, kChannels), from.rows / 2, from.columns / 2, 0});
    Merge& merge = merges.back();
    merge.layer = Linear(isa, layer, stage().parts(), {1, 4 * from.channels});
    if (merge.norm.present) merge.norm.fold({merge.layer.input});
    consider(merge.layer);
    add(Step::Kind::merge, merges.size() - 1);
    ++operations;
}

void Plan::attention_pool(Attention attention) {
    ++operations;
    Attentions group;
    attention.group = stage().tokens;
    attention.padded_group = round_up(attention.group, kChannels);
    attention.finish(isa);
    const size_t outputs = attention.proj.channels;
    group.branches.push_back(std::move(attention));
    consider(group);
    attentions.push_back(std::move(group));
    add(Step::Kind::project, attentions.size() - 1);
    stages.push_back({1, outputs, round_up(outputs, kChannels), 0, 0, 0});
    add(Step::Kind::attend, attentions.size() - 1);
}

void Plan::pool(Pool pool) {
    pooled = true;
    ++operations;
    pooling = std::move(pool);
    // A norm just before the pooling is applied to the rows that are looked at alone.
    if (std::vector<Step>& steps = phases.back().steps; steps.back().kind == Step::Kind::norm) {
        pooling.before = std::move(norms.back());
        norms.pop_back();
        steps.pop_back();
    }
}

void Plan::classify(std::vector<Linear> layers) {
    classifier_place = place();
    classifiers = std::move(layers);
    for (const Linear& layer : classifiers) consider(layer);
    ++operations;
}

size_t Plan::outputs() const {
    return classifiers.empty() ? product_of(pooling.tokens, stage().channels) : classifiers[0].channels;
}

void Plan::consider(const Linear& layer) { widen(largest_row, std::max(layer.inputs, layer.outputs)); }

void Plan::consider(Attentions& group) {
    for (Attention& attention : group.branches) {
        consider(attention.qkv);
        consider(attention.proj);
        widen(largest_group, attention.padded_group);
        widen(largest_head, attention.heads.padded());
        attention.head_codes = product_of(attention.padded_group, attention.heads.padded());
        attention.key_bytes = product_of(round_up(attention.group, 64), attention.heads.padded());
        attention.first_codes = group.codes;
        attention.first_keys = group.keys;
        attention.first_bias = group.biases;
        grow(group.codes, attention.heads.count, attention.head_codes);
        grow(group.keys, attention.heads.count, attention.key_bytes);
        grow(group.biases, attention.heads.count, attention.padded_group);
    }
    if (group.windows == 0) {
        widen(largest_codes, group.codes);
        widen(largest_keys, group.keys);
        widen(largest_bias, group.biases);
    } else {
        const size_t at_once = windows[group.windows - 1].at_once;
        widen(largest_window_codes, product_of(at_once, group.codes));
        widen(largest_window_keys, product_of(at_once, group.keys));
        widen(largest_window_bias, product_of(at_once, group.biases));
    }
}

}  // namespace qvit
