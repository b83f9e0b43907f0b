"""What `--help` ends with: examples, and what one should know; by command, "" for all."""

EXAMPLES = {
    "": """\
examples:
  embedcam demo                                  everything at work on handwritten digits
  embedcam build photos/ my.index --network torchvision:resnet50
  embedcam explain my.index query.jpg -o why.png
  embedcam info my.index

exit codes: 0 done, 2 wrong arguments, 3 an image, 4 the network, 5 the index,
            6 a file or folder that cannot be read or written, 130 interrupted
""",
    "build": """\
examples:
  embedcam build photos/ my.index --network torchvision:resnet50
  embedcam build list.csv my.index --network torchvision:mobilenet_v2 \\
      --weights mobilenet.safetensors --head head.safetensors --resize squash
  embedcam build photos/ my.index --network mypackage.models:make --recipe paper
  embedcam build photos/ my.index --network timm:resnet18 --exclude thumbs --exclude '*.gif'
  embedcam build my.index --embeddings e.npy --pooled p.npy --grid 7x7 --ids ids.csv
  embedcam build my.index --refit                fit again on all images, also those added later

A killed build goes on where it stopped when the same command is run again.
IMAGES is a folder with a folder per class, a flat folder, or a CSV with path,label[,id]. It ends
with what was taken, and what was not; --exclude leaves out more. HEIC takes pip install
"embedcam[heic]".
""",
    "add": """\
examples:
  embedcam add my.index more-photos/
  embedcam add my.index photos/ --skip-existing          only those that are new
  embedcam add my.index photos/ --update                 also what has changed or is gone

What the first build fitted stays as it is; weights of old images are not computed again.
--update compares size, time and then content of each file with what was indexed.
""",
    "remove": """\
examples:
  embedcam remove my.index owls/1.jpg owls/2.jpg
  embedcam remove my.index --from ids.txt        one id a line; - reads standard input

Removed images are never returned; `embedcam compact` then drops their bytes.
""",
    "compact": """\
examples:
  embedcam compact my.index
  embedcam compact my.index --rebuild-faiss              from the embeddings; the file is not read
  embedcam compact my.index --rebuild-faiss HNSW32       with another factory, or none
""",
    "compress": """\
examples:
  embedcam compress my.index small.index --prototypes 500
  embedcam compress my.index small.index --prototypes 5 --per-class

Near images are merged into one prototype with the mean of their weights, shown by the picture of
the image in their middle. What that loses is measured and printed; `embedcam info` repeats it.
""",
    "explain": """\
examples:
  embedcam explain my.index query.jpg -o why.png
  embedcam explain my.index queries/*.jpg -o pictures/ --html why.html -n 10
  embedcam explain my.index query.jpg --result owls/1.jpg -o match.png
  embedcam explain my.index query.jpg --result owls/1.jpg --above gulls/2.jpg -o rather.png
  embedcam explain my.index query.jpg --neighbors owls/1.jpg,owls/2.jpg --json
  embedcam explain my.index query.jpg --method scorecam -o slow.png
  embedcam explain my.index photos/owls/1.jpg --exclude-query -o others.png
  embedcam explain my.index queries/ --report out/        a folder or a CSV, on one page

The network is loaded as it was for the build; where its files have moved, say so with --weights
and --head. Pictures are written for queries where -o or --html asks for them. A report that was
stopped goes on when the same command is run again.
""",
    "compare": """\
examples:
  embedcam compare my.index query.jpg owls/1.jpg -o receipt.png
  embedcam compare my.index query.jpg owls/1.jpg --above hawks/3.jpg -o above.png
  embedcam compare my.index query.jpg owls/1.jpg --json --lines 20

RESULT is the id of an image of the index. What adds up to the similarity is printed; -o draws where
in both pictures it is, and which cells match. What the average image shares is put apart.
""",
    "evaluate": """\
examples:
  embedcam evaluate my.index --images queries/ --html report.html
  embedcam evaluate my.index --images queries/ --boxes boxes.csv --csv numbers.csv
  embedcam evaluate my.index --images queries/ --masks masks/ --limit 500 --faithfulness 20
  embedcam evaluate my.index --images list.csv --measures retrieval,objects --json
  embedcam evaluate my.index --images queries/ --methods gradcam,xgradcam --html report.html
  embedcam evaluate my.index --images queries/ --recipes paper,mine.toml --html report.html

boxes.csv has the columns path,x0,y0,x1,y1[,label][,width,height], a line a box; masks are named as
the images are, white on the object. An image that the index holds is explained by others only.
""",
    "serve": """\
examples:
  embedcam serve my.index
  embedcam serve my.index --onnx network.onnx
  embedcam serve my.index --port 9000 --max-neighbors 20 --timeout 10
  curl -F image=@query.jpg http://127.0.0.1:8000/explain

One process, on this machine alone unless --host says otherwise. /openapi.json describes the
addresses. SIGTERM and Ctrl-C end it once what was begun is finished; SIGHUP serves a changed index.
""",
    "export": """\
examples:
  embedcam export my.index -o network.onnx
  embedcam export my.index -o network.onnx --weights resnet50.safetensors
  embedcam explain my.index query.jpg --onnx network.onnx -o why.png      without torch

One file with the activations and the embedding as outputs, for batches of any size, held against
torch before it is put in place. The network is loaded as it was for the build; where its files
have moved, say so with --weights and --head. Needs pip install "embedcam[onnx]".
""",
    "info": """\
examples:
  embedcam info my.index
  embedcam info my.index --json
  embedcam info my.index --ids                   the ids of its images, one a line

What is printed is escaped where it would not be seen (\\x1b, \\u202e); --json has it as it is.
""",
    "calibrate": """\
examples:
  embedcam calibrate my.index               trust and match for the images that it holds now
  embedcam calibrate my.index --no-trust    match alone, without pictures or a network

Weights stay as they are. Trust shows at most 512 of the pictures to the network.
""",
    "verify": """\
example:
  embedcam verify my.index && echo whole
""",
    "demo": """\
examples:
  embedcam demo
  embedcam demo out/ --seed 1
""",
}
