-- Limit the decoding time of large images: estimate the cost of an image from its header, queue costly requests by
-- caller. nginx.conf needs `lua_shared_dict decoding 1m;`, `lua_check_client_abort on;` and, for each server, leave()
-- in log_by_lua.
local decoding = {
    -- Costs are in PNG pixels. To decode and resize one takes NANOSECONDS of a core (docs/serving-performance.md).
    NANOSECONDS = 25,
    MOST = 25e6, -- cost of an image whose header is too long: the classifier's limit of pixels per request
    MOST_PARTS = 2000, -- limit of JPEG segments or PNG chunks read per request, each takes 2 reads of the body
    cheap = 200e3, -- requests up to this cost (5 ms) never wait
    costly_at_once = 1, -- slots: instances of the classifier - 1, so that one is free for small images
    wait_seconds = 10,
    slot_seconds = 5, -- then the slot of a crashed worker is free again; decoding takes at most 0.6 s
}
-- By format, the cost of a pixel and of an encoded byte. A JPEG costs half as much per pixel, and less if it is decoded
-- at a reduced size, which saves little for a progressive JPEG.
local WEIGHTS = { png = { 1, 0.4 }, webp = { 1, 1.8 }, jpeg = { 0.5, 0.4 }, progressive = { 1, 0.4 } }
-- A JPEG marker with a segment, or the end-of-image marker; not a stuffed byte, restart marker or fill byte.
local MARKER = "\255[^%z\1\208-\216\255]"
local SEARCHED = 4096 -- bytes
-- The prefix of an image as base64 text, which the classifier accepts (serving/triton/request_parser.py), and its greatest
-- length.
local DATA_URL, LONGEST_PREFIX = "^data:image/%l+;base64,", 23

-- The unsigned integer in bytes first to last; the most significant byte is at `first`, which may be the higher index.
local function number(text, first, last)
    local value = 0
    for index = first, last, first <= last and 1 or -1 do
        value = value * 256 + (text:byte(index) or 0)
    end
    return value
end

-- Each parser returns the number of pixels and the format; nil for the pixels if the header does not end within
-- MOST_PARTS. If a file has several sizes, the largest counts, because decoders differ in which one they use.
local function png(part, more)
    local pixels, position = 0, 8
    while more() do
        local head = part(position, 16)
        local kind = head:sub(5, 8)
        if kind == "IDAT" or kind == "fdAT" or #head < 8 then
            return #head < 8 and 0 or pixels, "png"
        elseif kind == "IHDR" then
            pixels = math.max(pixels, number(head, 9, 12) * number(head, 13, 16))
        end
        position = position + 12 + number(head, 1, 4)
    end
end

local function jpeg(part, more)
    local pixels, form, position = 0, "jpeg", 2
    while more() do
        local bytes = part(position, SEARCHED)
        local index = bytes:find(MARKER)
        if not index then
            return #bytes < SEARCHED and 0 or nil, form
        end
        local head = part(position + index - 1, 9)
        local marker = head:byte(2)
        if marker == 0xDA or marker == 0xD9 then -- start of the first scan, end of the image
            return marker == 0xDA and pixels or 0, form
        elseif marker >= 0xC0 and marker <= 0xCF and (marker == 0xC0 or marker % 4 ~= 0) then -- a frame header
            pixels = math.max(pixels, number(head, 6, 7) * number(head, 8, 9))
            form = marker > 0xC1 and "progressive" or form
        end
        position = position + index + 1 + math.max(2, number(head, 3, 4))
    end
end

local function webp(part)
    local head = part(0, 30)
    local kind, packed = head:sub(13, 16), number(head, 25, 22)
    if kind == "VP8X" then
        return (1 + number(head, 27, 25)) * (1 + number(head, 30, 28)), "webp"
    elseif kind == "VP8L" then
        return (1 + packed % 16384) * (1 + math.floor(packed / 16384) % 16384), "webp"
    end
    return kind == "VP8 " and number(head, 28, 27) % 16384 * (number(head, 30, 29) % 16384) or 0, "webp"
end

-- Returns a read(position, count) of the file whose base64 text `read_text` reads; it decodes only the groups of four
-- letters with these bytes. Text that is not base64 gives an empty string; the classifier rejects it.
local function base64_reader(read_text)
    return function(position, count)
        local first = math.floor(position / 3)
        local text = read_text(4 * first, 4 * (math.ceil((position + count) / 3) - first))
        return (ngx.decode_base64(text) or ""):sub(position - 3 * first + 1, position - 3 * first + count)
    end
end

-- The cost of decoding the image of `size` bytes at `offset`; 0 for a file that Pillow rejects before it decodes a
-- pixel. read(offset, count): returns up to count bytes of the body. counted: a table per request, for the number of
-- parts read.
function decoding.pixels(read, offset, size, counted)
    counted = counted or {}
    local function more()
        counted.parts = (counted.parts or 0) + 1
        return counted.parts <= decoding.MOST_PARTS
    end
    local _, prefix = read(offset, math.min(LONGEST_PREFIX, size)):find(DATA_URL)
    local start, stop = offset + (prefix or 0), offset + size
    local function part(position, count)
        return start + position < stop and read(start + position, math.min(count, stop - start - position)) or ""
    end
    if prefix then
        part, size = base64_reader(part), math.floor((stop - start) * 3 / 4)
    end
    local head = part(0, 12)
    local parse = head:sub(1, 8) == "\137PNG\r\n\26\n" and png
        or head:sub(1, 3) == "\255\216\255" and jpeg
        or head:sub(1, 4) == "RIFF" and head:sub(9, 12) == "WEBP" and webp
    if not parse then
        return 0
    end
    local pixels, form = parse(part, more)
    if pixels and pixels > 0 then
        pixels = math.min(decoding.MOST, pixels * WEIGHTS[form][1] + size * WEIGHTS[form][2])
    end
    return pixels or decoding.MOST
end

-- The id of this request in all its phases. Not in ngx.ctx, because an error page clears that.
local function id()
    return ngx.var.connection .. ":" .. ngx.var.connection_requests
end

local costly_requests = {} -- the costly requests of this worker, so that leave() is cheap for all others

-- Wait for a slot to decode images of this cost, in the access phase. Returns an error message after wait_seconds, else
-- nil. Only one request of an address competes for the slots at a time, so that many requests get no larger share.
function decoding.enter(pixels)
    if pixels <= decoding.cheap then
        return nil
    end
    local dict, request, caller = ngx.shared.decoding, id(), "caller " .. ngx.var.binary_remote_addr
    costly_requests[request] = true
    local arrived, milliseconds, first = ngx.now(), math.ceil(pixels * decoding.NANOSECONDS / 1e6), nil
    repeat
        first = first or dict:add(caller, request, decoding.wait_seconds + 1) and ngx.now()
        for slot = 1, first and decoding.costly_at_once or 0 do
            if dict:add("slot " .. slot, request, decoding.slot_seconds, milliseconds) then
                dict:delete(caller)
                return nil
            end
        end
        -- The longer a request has waited, the more often it tries, so that old requests get a slot first.
        ngx.sleep(first and 0.002 + 0.02 / (1 + 2 * (ngx.now() - first)) or 0.05 + 0.05 * math.random())
    until ngx.now() - arrived > decoding.wait_seconds
    if first then
        dict:delete(caller)
    end
    return "other large images have been decoded for " .. decoding.wait_seconds .. " s; send smaller images, or try again later"
end

-- Free the slot of this request, after Triton's response or in the log phase. If the client disconnected (499) or the
-- gateway timed out (504), Triton still decodes, so the slot stays in use for the estimated decoding time.
function decoding.leave()
    if next(costly_requests) == nil or not costly_requests[id()] then
        return
    end
    costly_requests[id()] = nil
    local dict, caller = ngx.shared.decoding, "caller " .. ngx.var.binary_remote_addr
    for slot = 1, decoding.costly_at_once do
        local holder, milliseconds = dict:get("slot " .. slot)
        if holder and holder == id() then
            if ngx.var.status == "499" or ngx.var.status == "504" then
                dict:set("slot " .. slot, "left early", milliseconds / 1000)
            else
                dict:delete("slot " .. slot)
            end
        end
    end
    local first = dict:get(caller)
    if first and first == id() then
        dict:delete(caller)
    end
end

return decoding
