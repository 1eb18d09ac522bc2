// How cam_cuda shares a call out: decided on the host from shapes, strides and the device, followed by the
// kernels. Nothing else decides the order of a sum, so maps are bitwise the same from run to run.
#pragma once

#include <algorithm>
#include <utility>

#include "diffcam/cam.h"

namespace diffcam {

constexpr int kCamLogThreads = 8;
constexpr int kCamThreads = 1 << kCamLogThreads;
constexpr int kCamWarps = kCamThreads / 32;
constexpr int kCamStages = 2;  // tiles in shared memory: one is used while the other arrives
constexpr int kCamWide = 16;   // bytes of the widest access

// Where the weight of a channel comes from.
enum class CamWeights : int {
    none,       // nowhere: the map is a sum of products of activations and gradients
    given,      // gradients that are the same at every position
    mean,       // gradcam: the mean of the gradients
    cross,      // xgradcam: sums of products and of activations
    plus_plus,  // gradcam++: sums of activations first, then of a function of them and the gradients
};

// When weights are formed.
enum class CamFlow : int {
    stream,  // before any tile, if there are weights at all
    fused,   // chunk by chunk, from the tiles that are then added to the map
    apart,   // for all channels, in a pass of its own over gradients (and activations, which are read again)
};

struct CamInput {
    const void* data;
    int64_t image, target, channel, position;  // strides; position where all positions have one
    int64_t spatial[kSpatialRank];
    bool rows;       // the tile's rows are neighbours in memory; elements are copied one by one otherwise
    bool run;        // and the rows follow each other without a gap
    int row_stride;  // of the tile in shared memory, elements
    int tile_bytes;  // most that a tile takes in shared memory
};

struct CamPlan {
    CamInput activations, gradients;
    CamWeights weights;
    bool constant;           // gradients are the same at every position, and no tile holds them
    bool rectify_gradients;  // negative gradients count as zero
    bool rectify_products;   // negative products do
    bool relu;
    Normalization normalize;
    double eps;
    void* maps;
    void* partial;  // raw maps (parts, items, positions) where parts > 1

    int64_t items, targets;  // an item is an image and a target
    int channels, positions;
    int extent[kSpatialRank];

    // Blocks. An item has `parts` clusters of `cluster` blocks. Parts share its channels; the blocks of a
    // cluster share those of their part, or the positions.
    int parts, cluster;
    bool share_positions;
    int block_channels, block_positions;

    // A block takes `chunk` channels at `tile` positions at a time. A tile in shared memory has rows of
    // positions, one a channel, or rows of channels.
    int chunk, tile;
    bool channel_rows;
    CamFlow flow;
    bool whole;          // a tile has all positions of the block
    bool keeps_weights;  // shared memory has the weights of all of the block's channels
    int row_lanes;       // logarithm of how many threads copy one row
    int sum_lanes;       // of how many lanes sum one segment of a channel
    int sum_segments;    // of how many segments a channel has
    int pool_lanes;      // of how many lanes sum one position
    int pool_groups;     // how many groups of threads share the channels of a chunk
    bool raw_in_shared;  // the raw map of the block's positions

    // Shared memory, in bytes from its start. The stages come first.
    int stage_bytes, weights_at, sums_at, map_at, raw_at, extremes_at, shared_bytes;
};

namespace cam_planning {

constexpr int64_t kThreeBlocks = 74 << 10;  // shared memory of a block, when a multiprocessor has 228 KiB
constexpr int64_t kTwoBlocks = 112 << 10;
constexpr int64_t kWeightsBytes = 32 << 10;  // most that the weights of one block take
constexpr int64_t kRawBytes = 32 << 10;    // a raw map of several tiles is kept in so much, or in the result
constexpr int64_t kPieceBytes = 96 << 10;  // an item is not cut into smaller pieces where there are many,
constexpr int64_t kSmallPieceBytes = 24 << 10;  // nor where there are few
constexpr int kPortableCluster = 8;
constexpr int kLargestCluster = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Of the smallest power of two that is not less.
inline int logarithm(int64_t x) {
    int result = 0;
    while (int64_t{1} << result < x) ++result;
    return result;
}
// The smallest x >= least that leaves the remainder of `like` when divided by a power of two.
inline int64_t congruent(int64_t least, int64_t like, int64_t power) {
    return least + ((like - least) & (power - 1));
}

struct Layout {
    bool planar, interleaved, constant;
    int64_t position;
};

inline Layout layout_of(const ConstView& view, const CamShape& shape) {
    // Strides of dimensions of size one say nothing.
    bool uniform = true, constant = true;
    int64_t inner = 1, position = 1;
    bool seen = false;
    for (int d = kSpatialRank - 1; d >= 0; --d) {
        const int64_t size = shape.extent.size[d], stride = view.spatial_stride[d];
        if (size == 1) continue;
        if (!seen) position = stride;
        uniform = uniform && stride == inner * position;
        constant = constant && stride == 0;
        inner *= size;
        seen = true;
    }
    return {uniform && position == 1, uniform && (view.channel_stride == 1 || shape.channels == 1), constant,
            position};
}

class Planner {
  public:
    Planner(const CamShape& shape, const ConstView& activations, const ConstView& gradients, CamMethod method,
            const CudaQueue& queue)
        : queue_(queue),
          bytes_(scalar_bytes(shape.type)),
          sum_bytes_(shape.type == ScalarType::float64 ? 8 : 4),
          wide_(kCamWide / bytes_) {
        CamPlan& p = plan_;
        fits_ = shape.extent.positions() < kMost && shape.channels < kMost;
        p.positions = static_cast<int>(shape.extent.positions());
        p.channels = static_cast<int>(shape.channels);
        p.targets = shape.targets;
        p.items = shape.images * shape.targets;
        for (int d = 0; d < kSpatialRank; ++d) p.extent[d] = static_cast<int>(shape.extent.size[d]);
        const Layout a = layout_of(activations, shape), g = layout_of(gradients, shape);
        p.constant = shape.constant_gradients || g.constant;
        p.rectify_gradients = method == CamMethod::layercam;
        p.rectify_products = method == CamMethod::elementwise;
        p.weights = method == CamMethod::xgradcam            ? CamWeights::cross
                    : method == CamMethod::gradcam_plus_plus ? CamWeights::plus_plus
                    : p.constant                             ? CamWeights::given
                    : method == CamMethod::gradcam           ? CamWeights::mean
                                                             : CamWeights::none;
        p.channel_rows = !a.planar && a.interleaved && (p.constant || (!g.planar && g.interleaved));
        p.activations = input(activations, a);
        p.gradients = input(gradients, g);
        needs_sums_ = p.weights != CamWeights::none && p.weights != CamWeights::given;
        tensors_ = p.constant ? 1 : 2;
        item_bytes_ = tensors_ * bytes_ * shape.channels * shape.extent.positions();
    }

    // False where no division of the work fits the device.
    bool plan(CamPlan* result) {
        const bool done = fits_ && (needs_sums_ ? plan_sums() : plan_streams());
        *result = plan_;
        return done;
    }

  private:
    CamInput input(const ConstView& view, const Layout& layout) const {
        CamInput input{};
        input.data = view.data;
        input.image = view.image_stride;
        input.target = view.target_stride;
        input.channel = view.channel_stride;
        input.position = layout.position;
        std::copy(view.spatial_stride, view.spatial_stride + kSpatialRank, input.spatial);
        input.rows = plan_.channel_rows ? layout.interleaved : layout.planar;
        return input;
    }

    bool clusters() const { return queue_.capability >= 90; }

    int largest_cluster() const {
        if (!clusters()) return 1;
        constexpr int kFullDevice = 100;  // multiprocessors; a slice of a device may lack room for 16 blocks
        return queue_.multiprocessors >= kFullDevice ? kLargestCluster : kPortableCluster;
    }

    // Blocks that share an item so that there are enough of them, none with too little to do.
    int wanted_cluster() const {
        const CamPlan& p = plan_;
        const int64_t enough = 8 * int64_t{queue_.multiprocessors};
        const int most = p.items * kLargestCluster <= queue_.multiprocessors
                             ? largest_cluster()
                             : std::min(largest_cluster(), kPortableCluster);
        int cluster = 1;
        while (2 * cluster <= most && p.items * cluster < enough && p.channels >= 32 * cluster) {
            const bool few = p.items * cluster < queue_.multiprocessors;
            if (item_bytes_ / (2 * cluster) < (few ? kSmallPieceBytes : kPieceBytes)) break;
            cluster *= 2;
        }
        return cluster;
    }

    // Weights need whole channels: in the tile of one block, in those of a cluster, or read twice.
    bool plan_sums() {
        const int wanted = wanted_cluster();
        const int64_t budgets[] = {kThreeBlocks, kTwoBlocks};
        for (int cluster = 1; cluster <= largest_cluster(); cluster *= 2) {
            const bool share_positions = cluster > 1;
            if (share_positions && plan_.positions < 64 * cluster) break;
            for (const int64_t budget : budgets)
                if (cut(share_positions ? cluster : wanted, share_positions, true, budget)) return true;
        }
        for (int cluster = 1; cluster <= std::min(largest_cluster(), kPortableCluster); cluster *= 2) {
            if (cluster > 1 && plan_.positions < 64 * cluster) break;
            if (cut(cluster > 1 ? cluster : wanted, cluster > 1, true, queue_.shared_bytes)) return true;
        }
        return cut(1, false, false, kThreeBlocks);
    }

    bool plan_streams() {
        constexpr int64_t kManyPositions = 1024;
        const bool share_positions = plan_.positions >= kManyPositions;
        return cut(wanted_cluster(), share_positions, false, kThreeBlocks);
    }

    // Parts where clusters do not give enough blocks, or where a block cannot keep the weights of its
    // channels. Their maps are added up by a second launch.
    int64_t wanted_parts(int cluster) const {
        const CamPlan& p = plan_;
        int64_t parts = 1;
        if (p.keeps_weights) parts = std::max<int64_t>(1, ceil_div(p.channels * sum_bytes_, kWeightsBytes));
        const int64_t blocks = p.items * cluster, piece = item_bytes_ / cluster;
        const int64_t large = clusters() ? 512 << 10 : 64 << 10;
        if (blocks >= queue_.multiprocessors || piece < large) return parts;
        const int64_t most =
            std::min<int64_t>({64, 2 * queue_.multiprocessors / blocks, 2 * piece / large, p.channels / 8});
        return std::max(parts, most);
    }

    bool cut(int cluster, bool share_positions, bool whole, int64_t budget) {
        CamPlan& p = plan_;
        set_whole(whole);
        int64_t parts = wanted_parts(cluster);
        // Blocks that share channels need no cluster when a second launch adds up their maps anyway.
        if (parts > 1 && !share_positions) parts *= std::exchange(cluster, 1);
        p.cluster = cluster;
        p.share_positions = share_positions && cluster > 1;
        const int64_t sharers = parts * (p.share_positions ? 1 : cluster);
        p.block_channels = p.channels;
        if (sharers > 1) {
            // A block's channels begin where wide accesses can.
            constexpr int64_t kRowBytes = 64, kPlanes = 8;
            const int64_t multiple = p.channel_rows ? kRowBytes / bytes_ : kPlanes;
            p.block_channels = static_cast<int>(round_up(ceil_div(p.channels, sharers), multiple));
            if (parts > 1) parts = std::max<int64_t>(1, ceil_div(p.channels, p.block_channels));
        }
        p.parts = static_cast<int>(parts);
        p.block_positions = p.share_positions
                                ? static_cast<int>(round_up(ceil_div(p.positions, cluster), wide_))
                                : p.positions;
        budget = std::min(budget, queue_.shared_bytes);
        return p.channel_rows ? place_channel_rows(budget) : place_planes(budget);
    }

    void set_whole(bool whole) {
        CamPlan& p = plan_;
        p.whole = whole;
        p.flow = !needs_sums_ ? CamFlow::stream : whole ? CamFlow::fused : CamFlow::apart;
        p.keeps_weights = p.constant || p.flow == CamFlow::apart;
    }

    // Bytes of shared memory that depend on neither the chunk nor the tile.
    int64_t fixed_bytes() const {
        const CamPlan& p = plan_;
        int64_t bytes = 2 * (kCamWarps + 1) * sum_bytes_ + 8 * kCamWide;
        bytes += kCamStages * tensors_ * 2 * kCamWide;  // tiles begin as misaligned as their rows
        if (p.keeps_weights) bytes += p.block_channels * sum_bytes_;
        if (needs_sums_) bytes += 4 * kCamWarps * sum_bytes_;  // segments of few channels
        if (!p.whole && p.block_positions * sum_bytes_ <= kRawBytes) bytes += p.block_positions * sum_bytes_;
        return bytes;
    }

    int64_t sums_per_channel() const { return needs_sums_ ? 5 + (plan_.keeps_weights ? 0 : 1) : 0; }

    int64_t row_stride(const CamInput& input, int64_t row) const {
        if (plan_.channel_rows) {
            // An odd number of wide accesses: neighbouring rows start in different banks.
            const int64_t stride = congruent(row, input.rows ? input.position : 0, wide_);
            return stride / wide_ % 2 == 0 ? stride + wide_ : stride;
        }
        if (!input.rows) return row;
        return input.channel == row ? row : congruent(row, input.channel, wide_);
    }

    int64_t row_strides(int64_t row) const {
        return row_stride(plan_.activations, row) + (plan_.constant ? 0 : row_stride(plan_.gradients, row));
    }

    // Elements of the map of a tile, once for every group of threads that adds to it.
    static int64_t map_elements(int64_t tile, int lanes) {
        return tile * std::max<int64_t>(1, kCamThreads / (tile * lanes));
    }

    bool place_planes(int64_t budget) {
        CamPlan& p = plan_;
        p.pool_lanes = 0;
        const int64_t free = budget - fixed_bytes(), least = std::min(8, std::max(1, p.block_channels));
        const auto channels_for = [&](int64_t tile) {
            const int64_t map = map_elements(tile, 1) * sum_bytes_;
            return (free - map) / (kCamStages * row_strides(tile) * bytes_ + sums_per_channel() * sum_bytes_);
        };
        int64_t tile = p.block_positions, chunk = channels_for(tile);
        if (chunk < (p.whole ? 1 : least)) {
            if (p.whole) return false;
            constexpr int64_t kTilePositions = 64;
            chunk = least;
            const int64_t per_position = kCamStages * tensors_ * chunk * bytes_ + sum_bytes_;
            tile = (free - chunk * kCamStages * tensors_ * kCamWide -
                    (kCamThreads + sums_per_channel() * chunk) * sum_bytes_) /
                   per_position / kTilePositions * kTilePositions;
            if (tile < kTilePositions) return false;
        }
        // As many chunks as there are tiles in shared memory, so that one arrives while another is used; and
        // chunks that begin where wide accesses can.
        int64_t multiple = wide_;
        while (multiple > 1 && multiple / 2 * p.positions % wide_ == 0) multiple /= 2;
        chunk = std::min(chunk, round_up(ceil_div(p.block_channels, kCamStages), multiple));
        if (chunk >= multiple) chunk = chunk / multiple * multiple;
        p.tile = static_cast<int>(tile);
        p.chunk = static_cast<int>(std::max<int64_t>(chunk, 1));
        for (CamInput* input : {&p.activations, &p.gradients}) {
            input->run = input->rows && input->channel == p.positions && p.tile == p.positions;
            set_tile(input, p.chunk, p.tile);
        }
        // Lanes that sum one channel: enough to occupy the threads, and to keep channels in different banks.
        const int row = p.constant ? p.activations.row_stride : p.gradients.row_stride;
        p.sum_lanes = 0;
        while (p.sum_lanes < 5 &&
               (2 * p.chunk << p.sum_lanes <= kCamThreads || row % (2 << p.sum_lanes) == 0))
            ++p.sum_lanes;
        p.sum_segments = 0;
        while (2 * p.chunk << (p.sum_lanes + p.sum_segments) <= kCamThreads) ++p.sum_segments;
        return lay_out(budget);
    }

    bool place_channel_rows(int64_t budget) {
        CamPlan& p = plan_;
        p.pool_lanes = logarithm(wide_);
        p.sum_lanes = 5 - p.pool_lanes;
        p.sum_segments = 0;
        const int64_t channels = round_up(std::max(p.block_channels, 1), wide_);
        const auto positions_for = [&](int64_t row, int64_t bytes) {
            const int64_t spent = (sums_per_channel() * row + kCamThreads) * sum_bytes_;
            return (bytes - fixed_bytes() - spent) / (kCamStages * row_strides(row) * bytes_ + sum_bytes_);
        };
        // Rows of whole memory transactions, longer where there are few of them.
        constexpr int64_t kFullRow = 128, kShortRow = 64, kLongRow = 2048;
        int64_t row = std::min(kFullRow / bytes_, channels);
        int64_t positions = positions_for(row, budget);
        if (positions >= p.block_positions) {
            const int64_t most = std::min(kLongRow / bytes_, round_up(ceil_div(channels, kCamStages), wide_));
            while (2 * row <= most && positions_for(2 * row, budget) >= p.block_positions) row *= 2;
        } else if (p.whole) {
            row = std::min(kShortRow / bytes_, channels);
            positions = positions_for(row, budget);
            if (positions < p.block_positions) return false;
        }
        if (positions < 1) return false;
        p.chunk = static_cast<int>(row);
        p.tile = static_cast<int>(std::min<int64_t>(positions, p.block_positions));
        for (CamInput* input : {&p.activations, &p.gradients}) {
            input->run = false;
            set_tile(input, p.tile, p.chunk);
        }
        return lay_out(budget);
    }

    void set_tile(CamInput* input, int64_t rows, int64_t row) const {
        input->row_stride = static_cast<int>(row_stride(*input, row));
        input->tile_bytes =
            static_cast<int>(round_up(rows * input->row_stride * bytes_, kCamWide) + kCamWide);
    }

    bool lay_out(int64_t budget) {
        CamPlan& p = plan_;
        const int64_t row = p.channel_rows ? p.chunk : p.tile;
        p.row_lanes = logarithm(std::min<int64_t>(kCamThreads, ceil_div(row, wide_)));
        set_whole(p.tile >= p.block_positions);
        p.pool_groups = static_cast<int>(map_elements(p.tile, 1 << p.pool_lanes) / p.tile);
        // A map of one tile stays where it was summed.
        p.raw_in_shared = p.parts == 1 && (p.whole || p.block_positions * sum_bytes_ <= kRawBytes);
        p.stage_bytes = p.activations.tile_bytes + (p.constant ? 0 : p.gradients.tile_bytes);
        int64_t at = kCamStages * int64_t{p.stage_bytes};
        const auto take = [&](int64_t elements) {
            const int64_t start = at;
            at = round_up(at + elements * sum_bytes_, kCamWide);
            return static_cast<int>(start);
        };
        const bool weighs = p.weights != CamWeights::none;
        p.weights_at = take(!weighs ? 0 : p.keeps_weights ? p.block_channels : p.chunk);
        p.sums_at = take(needs_sums_ ? (4 << p.sum_segments) * p.chunk + p.chunk : 0);
        p.map_at = take(int64_t{p.pool_groups} * p.tile);
        p.raw_at = p.whole ? p.map_at : take(p.raw_in_shared ? p.block_positions : 0);
        p.extremes_at = take(2 * (kCamWarps + 1));
        p.shared_bytes = static_cast<int>(at);
        return at <= budget;
    }

    static constexpr int64_t kMost = 1 << 30;

    const CudaQueue& queue_;
    const int64_t bytes_, sum_bytes_, wide_;  // of an element, of a sum; elements of a wide access
    int64_t tensors_ = 1, item_bytes_ = 0;
    bool fits_ = true, needs_sums_ = false;
    CamPlan plan_{};
};

}  // namespace cam_planning

inline bool cam_plan(const CamShape& shape, const ConstView& activations, const ConstView& gradients,
                     CamMethod method, const CudaQueue& queue, CamPlan* plan) {
    return cam_planning::Planner(shape, activations, gradients, method, queue).plan(plan);
}

}  // namespace diffcam
